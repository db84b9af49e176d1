"""What benchmarks measure: recipes that are never the same, and random banks for any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import MtaError
from adapters.recipe import parse_recipe
from bank.manifest import PosteriorRule, WeightRule, read_manifest
from bank.matrix import open_matrix
from bench.rig.subject import Subject, configured_subject, random_subject
from bench.rig.tiny import tiny_bank, weightless_model


@pytest.fixture
def subject(tiny_bank_folder: Path, tiny_model_folder: Path) -> Subject:
    return Subject(tiny_bank_folder, tiny_model_folder, read_manifest(tiny_bank_folder))


@pytest.mark.parametrize("rule", [WeightRule(), WeightRule(posterior=PosteriorRule(anchors=4))])
def test_recipes_are_fused_by_the_bank_never_the_same_and_last_as_long_as_a_run_needs(
    subject: Subject, rule: WeightRule
) -> None:
    manifest = subject.manifest.model_copy(update={"weights": rule})
    subject = replace(subject, manifest=manifest)
    names = subject.names(3000)
    assert len(set(names)) == 3000
    assert subject.names(20) == names[:20] != subject.names(20, seed=1)
    for name in names[:100]:
        recipe = parse_recipe(name)
        manifest.check(recipe)
        assert len(recipe.terms) == (rule.posterior or rule).anchors


def test_a_bank_with_too_few_anchors_says_so_and_no_bank_names_the_setting(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lonely = tiny_bank(tmp_path, tiny_model_folder, embedder_folder, anchors=1, k=1)
    recipes = Subject(lonely, tiny_model_folder, read_manifest(lonely)).recipes()
    next(recipes)
    with pytest.raises(MtaError, match="makes only 1 recipes"):
        next(recipes)
    monkeypatch.delenv("MTA_BANK", raising=False)
    with pytest.raises(MtaError, match="MTA_BANK"):
        configured_subject(None, None)


def test_a_random_bank_has_the_rank_that_was_asked_for(tmp_path: Path, tiny_model_folder: Path) -> None:
    made = random_subject(tmp_path, str(tiny_model_folder), 16, anchors=3)
    assert (made.manifest.rank, made.manifest.serving_rank, made.manifest.user_rank) == (16, 16, 0)
    assert open_matrix(made.bank, made.manifest).rows.shape[0] == 4  # the common row beside them


def test_a_model_without_weights_can_have_a_bank(tmp_path: Path, embedder_folder: Path) -> None:
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = weightless_model(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2, **shape)
    manifest = read_manifest(tiny_bank(tmp_path / "bank", model, embedder_folder))
    sizes = {module.name.rpartition(".")[2]: (module.h_in, module.h_out) for module in manifest.modules}
    assert len(manifest.modules) == 3 * 7
    assert (sizes["k_proj"], sizes["down_proj"]) == ((32, 16), (48, 32))
