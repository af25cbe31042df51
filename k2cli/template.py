"""What a new project begins with: it renders as it stands, and shows what there is to set."""

PROJECT = """\
[project]
name = "{name}"

[render]
model = "mini"        # the model in the box; or a folder, a file, a model that was pulled
# variant = "turbo"   # as --turbo does; --raw takes the other
batch = 2             # pictures per prompt
seed = 7              # picture i uses seed + i; "random" is another one every run
# size = "256x192"    # or aspect = "4:3"; the model's own size where left out
# cohesion = 0.5      # 0 every picture by itself … 1 one look; scope = "run" ties prompts together too
# creativity = "low"  # raw, low, medium, high: how far prompts are led beyond what they say
# steps, guidance, mu: the model's own recommendation where left out

[[prompt]]
name = "fox"          # file-name stem; made from the text where left out
text = "a red fox"

[[prompt]]
name = "owl"
text = "an owl on a night blue background"

[[prompt]]
name = "sailboat"
text = "a sailboat"
avoid = ""            # what the picture should keep away from

[style]               # how much each style of styles/ counts, −2 … 2
sticker = 1.0

# [[matrix]]          # a picture of every combination, whatever batch says here, with the same seeds
# size = ["256x256", "320x192"]
# style.sticker = [0, 0.5, 1]
"""

IGNORE = """\
# What k2 makes of the project, and can make again.
/outputs/
/gallery/
/.runs/
"""

STYLE = """\
# A style: words, and pictures that have the look.
keywords = ["sticker style"]
avoids = []

# [[reference]]
# image = "refs/*.png"
# weight = 1.0
"""
