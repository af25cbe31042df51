"""The expander finds the looks that cost the subject, and only those."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from model.train import expander
from model.train.looks import DRAWINGS, MEDIA


@pytest.fixture()
def drawn(monkeypatch):
    """Pictures are their specs; the judge reads every subject except in neon and in stencils."""
    specs = []

    def read(judge, pictures, subjects, among):
        specs.extend(pictures)
        assert all(name in spec.prompt and name in among for name, spec in zip(subjects, pictures, strict=True))
        return np.array(["neon" not in spec.prompt and "stencil" not in spec.prompt for spec in pictures])

    monkeypatch.setattr(expander, "render_specs", lambda pipeline, asked: asked)
    monkeypatch.setattr(expander, "retrieval", read)
    return specs


def test_looks_that_cost_the_subject_are_only_used_on_request(drawn):
    catalog = SimpleNamespace(subjects={name: None for name in ("fox", "owl", "apple", "car")})
    table = expander.measure(None, None, catalog, 3)

    assert expander.asked_only(table) == {"drawing": ["fluent-emoji-high-contrast"], "medium": ["neon"]}
    assert table.shape == (len(DRAWINGS), len(MEDIA)) and set(table.ravel()) == {0.0, 1.0}
    assert len({spec.seed for spec in drawn}) == 3 * table.size
    assert expander.asked_only(np.zeros_like(table))["medium"] == [name for name in MEDIA if name != "plain"]
