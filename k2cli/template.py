"""The files of a new project, which renders as is and shows what can be set."""

PROJECT_TOML = """\
[project]
name = "{name}"

[render]
model = "mini"        # bundled; or a folder, a file, a pulled model
# variant = "turbo"   # as --turbo; --raw overrides it
batch = 2             # pictures per prompt
seed = 7              # picture i uses seed + i; "random" is a new one every run
# size = "256x192"    # or aspect = "4:3"; default: the model's own
# cohesion = 0.5      # 0 independent pictures … 1 one look; scope = "run" ties prompts together too
# creativity = "low"  # raw, low, medium, high: how freely to extend prompts
# steps, guidance and mu default to what the model recommends

[[prompt]]
name = "fox"          # file-name stem; default: made from the text
text = "a red fox"

[[prompt]]
name = "owl"
text = "an owl on a night blue background"

[[prompt]]
name = "sailboat"
text = "a sailboat"
avoid = ""            # what to keep out of the picture

[style]               # weight of each style in styles/, −2 … 2
sticker = 1.0

# [[matrix]]          # one picture per combination, with the same seeds, whatever batch says
# size = ["256x256", "320x192"]
# style.sticker = [0, 0.5, 1]
"""

GITIGNORE_TEXT = """\
# Made by k2, and reproducible.
/outputs/
/gallery/
/.runs/
"""

STYLE_TOML = """\
# A style: keywords, and pictures with the look.
keywords = ["sticker style"]
avoids = []

# [[reference]]
# image = "refs/*.png"
# weight = 1.0
"""
