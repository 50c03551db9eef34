"""Table 9, against torch's own counter and real networks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.cli import main
from analysis.complexity import networks
from semformer.config import load_config
from semformer.stages import affinity, caae, deeplab, segmentor
from tests.analysis.scene import heading_and_lines

K, SIZE = 9, 56


def counted(model, side, **options) -> float:
    """Multiply-adds."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.rand(1, 3, side, side), **options)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("changes", [{}, {"caae.reconstruction": False, "cams.last_blocks": 2}])
def test_parameters_and_multiply_adds_are_those_of_real_networks(changes):
    config = load_config("micro", changes)
    guide = caae.build(config.caae, n_classes=K)
    network = segmentor.build(config.segmentor, n_classes=K, class_dim=config.caae.class_dim)
    others = [affinity.build(config.affinity), deeplab.build(config.deeplab, n_classes=K)]
    models = [network, network, guide, *others]
    sides = [SIZE, SIZE, config.caae.image_size, SIZE, SIZE]
    found = networks(config, SIZE)
    assert [one.parameters for one in found] == [sum(p.numel() for p in model.parameters()) for model in models]
    assert [one.size for one in found] == sides
    heads = network.class_head_weight.numel()  # of the class embeddings, which maps do not need
    wanted = [
        counted(network, SIZE) - heads,
        counted(network, SIZE, last_blocks=config.cams.last_blocks) - heads,
        *(counted(model, side) for model, side in zip(models[2:], sides[2:], strict=True)),
    ]
    assert [one.multiply_adds for one in found] == pytest.approx(wanted, rel=1e-6)


def test_the_papers_values_stand_beside_ours_and_what_makes_the_difference(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["complexity"]) == 0
    assert not [*tmp_path.iterdir()], "it makes no database"
    out = capsys.readouterr().out
    heading, lines = heading_and_lines(out)
    assert heading[2:] == ["Parameters (M) ours", "Parameters (M) paper", "FLOPs (G) ours", "FLOPs (G) paper"]
    assert lines[0] == ["TS-CAM", "448x448", "–", "22.04", "–", "22.67"]  # noqa: RUF001
    assert lines[1][1:] == ["448x448", "23.98", "24.06", "23.30", "23.34"]
    assert [line[0].split()[0] for line in lines[3:]] == ["CAAE,", "AffinityNet", "DeepLabV1"]
    assert {entry for line in lines[2:] for entry in line[3::2]} == {"–"}  # noqa: RUF001
    note = out.splitlines()[-1]
    assert "(197x384, in whose place ours has one of 784 patches), 24.06 M" in note
    assert note.endswith("normalises, 23.34 G.")


@pytest.mark.parametrize("arguments", [["--preset", "micro"], ["--size", "224"]])
def test_other_networks_and_sizes_have_no_values_of_the_paper(arguments, capsys):
    assert main(["complexity", *arguments]) == 0
    out = capsys.readouterr().out
    assert heading_and_lines(out)[0][2:] == ["Parameters (M)", "FLOPs (G)"]
    assert "paper does" not in out
    assert "TS-CAM" not in out


@pytest.mark.parametrize(
    ("size", "says"), [("450", "--size = 450 is no multiple of the patch size 16"), ("0", "--size 0: give the side")]
)
def test_a_size_that_cannot_be_is_told(size, says, capsys):
    assert main(["complexity", "--size", size]) == 2
    assert says in capsys.readouterr().err
