"""A small version of scripts/prove_removal.py: depthwise convolutions with gates and residual sums, a shuffle."""

import csv

import pytest
from programs import load_script


@pytest.fixture(scope="module")
def proof():
    return load_script("prove_removal")


def test_methods_are_found_by_their_unit(proof):
    methods = proof.removing_methods()
    assert {"fp", "slimming", "sfp"} <= set(methods) and "stripe" not in methods
    assert methods["fp"].coupled == "joint" and methods["slimming"].residual


def test_what_is_convolutional(proof):
    models = proof.torchvision().models
    assert proof.convolutional(models.get_model("squeezenet1_1", weights=None))
    assert not proof.convolutional(models.get_model("vit_b_32", weights=None))
    assert proof.by_size()[0].startswith("squeezenet")


def test_removal_is_lossless_and_resumes(proof, tmp_path):
    methods = {name: method for name, method in proof.removing_methods().items() if name in ("fp", "slimming")}
    models = ["mobilenet_v3_small", "shufflenet_v2_x0_5"]
    table = proof.Table(tmp_path / "table")
    proof.prove(models, methods, table, 100, tmp_path)
    written = (tmp_path / "table/rows.csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    ours = [row for row in rows if row["method"] in methods]
    assert len(ours) == 4 and len(rows) == 6
    for row in ours:
        assert not row["reason"], row
        assert float(row["channels"]) >= 0.3 and float(row["macs"]) > 0 and float(row["masked"]) > 1e-3
        assert float(row["difference"]) <= 1e-4 and float(row["reloaded"]) <= 1e-4
    proof.prove(models, methods, proof.Table(tmp_path / "table"), 0, tmp_path)  # nothing is left to do
    assert (tmp_path / "table/rows.csv").read_text() == written
