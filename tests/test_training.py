"""Training when memory runs short, and the peak memory that stages record."""

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._inductor.exc import InvalidCxxCompiler

from semformer import memory, pipeline
from semformer.config import flatten, load_config
from semformer.data.shapes import make_shapes
from semformer.errors import MachineError, UserError
from semformer.models.vit import Backbone
from semformer.stages import segmentor
from semformer.store import Store

CPU = torch.device("cpu")
MORE_THAN_THERE_IS = 2**50


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=12, val=2, size=48)


@pytest.fixture
def limit(monkeypatch):
    """limit(n): from now on networks fail to allocate memory, for real, when they are given more than n images.

    With `pairs`, that holds for the CAAE in training, and for its guidance with more than so many pairs.
    """
    tokens = Backbone.tokens

    def limit(n: int, pairs: int | None = None) -> None:
        def limited(self, images):
            most = (n if images.shape[-1] == 32 else 99) if pairs else n
            if len(images) > (most if self.training else pairs or 99):
                torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
            return tokens(self, images)

        monkeypatch.setattr(Backbone, "tokens", limited)

    return limit


def run(folder, store, *, until="segmentor", progress=lambda report: None, **changes):
    config = load_config("micro", {"caae.batch_size": 6, "segmentor.batch_size": 5, **changes})
    data = pipeline.open_data(config, folder)
    runs = pipeline.run(config, data, store, device=CPU, progress=progress, until=until)
    return {stage_run.stage: stage_run.artifact for stage_run in runs}


@pytest.mark.parametrize("changes", [{}, {"segmentor.pair_reduction": "image", "segmentor.optimizer.name": "sgd"}])
def test_training_in_pieces_ends_the_same(shapes, tmp_path, limit, caplog, changes):
    whole = run(shapes, Store(tmp_path / "whole"), **changes)
    limit(2, pairs=8)
    reports = []
    parts = run(shapes, Store(tmp_path / "parts"), progress=reports.append, **changes)
    assert whole["caae"].info["history"]["pieces"] == whole["segmentor"].info["history"]["pieces"] == [1, 1]
    assert parts["caae"].info["history"]["pieces"] == [4, 4]
    assert parts["segmentor"].info["history"]["pieces"][-1] in (4, 5)
    assert "caae: batches are taken in 2 pieces: they do not fit into memory" in caplog.messages
    assert "batches are taken in 4 pieces: they do not fit into memory" in {report.note for report in reports}
    for stage, artifact in whole.items():
        ours, theirs = (load_file(a.file(f"{stage}.safetensors")) for a in (parts[stage], artifact))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3, msg=lambda told, stage=stage: f"{stage} {told}")
        assert parts[stage].info["history"]["total"] == pytest.approx(artifact.info["history"]["total"], abs=1e-4)


SHALLOW = {
    "caae.decoder_depth": 1,
    "segmentor.backbone": "vit_wiring_patch8_32",
    "segmentor.image_size": 32,
    "cams.last_blocks": 2,
}
COMPILED = {"caae.compile": True, "segmentor.compile": True}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.timeout(900)
def test_compiled_training_ends_the_same_but_for_rounding(shapes, tmp_path, monkeypatch):
    embedded, plain = set(), segmentor.embed_in_pieces

    def embed(caae, images, pieces):
        embedded.add(len(images))
        return plain(caae, images, pieces)

    monkeypatch.setattr(segmentor, "embed_in_pieces", embed)
    eager = run(shapes, Store(tmp_path / "eager"), **SHALLOW)
    assert {n % 16 for n in embedded} != {0}
    embedded.clear()
    fast = run(shapes, Store(tmp_path / "compiled"), **SHALLOW, **COMPILED)
    assert {n % 16 for n in embedded} == {0}, "each number of images would be compiled anew"
    for stage, artifact in eager.items():
        assert fast[stage].key != artifact.key
        ours, theirs = (load_file(a.file(f"{stage}.safetensors")) for a in (fast[stage], artifact))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3, msg=lambda told, stage=stage: f"{stage} {told}")


def test_where_torch_cannot_compile_it_says_so(shapes, store, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise InvalidCxxCompiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is compiled yet
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", refuse)
    with pytest.raises(UserError, match=r"torch.compile does not work here .*Set caae.compile=false"):
        run(shapes, store, **SHALLOW, **COMPILED)


@pytest.mark.parametrize("stage", ["caae", "segmentor"])
def test_too_little_memory_for_one_image_says_what_to_make_smaller(shapes, store, limit, stage):
    run(shapes, store, until="caae")
    limit(0)
    with pytest.raises(MachineError, match=rf"^{stage}: out of memory on .* smaller {stage}\.image_size"):
        run(shapes, store, **({"seed": 1} if stage == "caae" else {}))


def test_images_that_do_not_fit_into_memory_together_have_the_same_maps(shapes, tmp_path, limit):
    whole, parts = Store(tmp_path / "whole"), Store(tmp_path / "parts")
    expected = run(shapes, whole, until="cams")["cams"]
    for stage in ("caae", "segmentor"):
        shutil.copytree(whole.root / stage, parts.root / stage)
    limit(99, pairs=3)
    found = run(shapes, parts, until="cams")["cams"]
    ours, theirs = (load_file(artifact.file("maps-00000.safetensors")) for artifact in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_too_little_memory_for_maps_says_so(shapes, store, monkeypatch):
    run(shapes, store)
    monkeypatch.setattr(Backbone, "tokens", lambda self, images: torch.empty(MORE_THAN_THERE_IS))
    with pytest.raises(MachineError, match=r"^cams: out of memory on .* smaller cams\.scales"):
        run(shapes, store, until="cams")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),  # of a process that cannot be forked
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),  # where other processes have filled the GPU
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_whatever_says_that_memory_ran_out_is_the_machines_fault(error):
    with pytest.raises(MachineError, match=r"caae: out of memory .*fewer trials"), memory.explained("caae", CPU):
        raise error


def test_what_does_not_fit_into_memory_together_is_taken_in_parts():
    taken = []

    def compute(rows):
        taken.append(list(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return [10 * row for row in rows]

    assert memory.in_parts(compute, range(5)) == [0, 10, 20, 30, 40]
    assert taken == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4]]


@pytest.mark.parametrize(("error", "rows"), [(MemoryError(), [0]), (RuntimeError("no such kernel"), [0, 1])])
def test_what_no_smaller_part_would_mend_is_raised(error, rows):
    def compute(rows):
        raise error

    with pytest.raises(type(error)) as caught:
        memory.in_parts(compute, rows)
    assert caught.value is error


@pytest.mark.parametrize("stage", [*(stage.name for stage in pipeline.STAGES), "pretrain"])
def test_every_stage_says_how_much_was_in_use_and_what_to_make_smaller(stage):
    with pytest.raises(MachineError, match=r"It needs a? ?smaller") as caught, memory.explained(stage, CPU):
        raise MemoryError
    told = float(re.search(r"with ([\d.]+) GiB in use", str(caught.value))[1])
    assert told == pytest.approx(memory.peak(CPU)["peak_bytes"] / 2**30, abs=0.02)
    for field in re.findall(r"\w+\.\w+(?=,| or|$)", memory.SMALLER[stage]):
        assert field in flatten(load_config("paper")), "what is to be smaller is a field"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_weights_that_do_not_fit_into_memory_are_the_machines_fault(tmp_path):
    save_file({"w": torch.zeros(2**24, dtype=torch.uint8)}, tmp_path / "weights.safetensors")
    code = f"""
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from semformer import memory
from semformer.errors import MachineError, UserError
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 3 * 2**23,) * 2)
try:
    with memory.explained("cams", torch.device("cpu")):
        load_file({str(tmp_path / "weights.safetensors")!r})
except MachineError as error:
    print(error, error.__cause__)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "cams: out of memory on" in told
    assert "unable to mmap" in told


@pytest.mark.parametrize(
    "error", [ValueError("bad"), RuntimeError("shapes do not fit"), FileNotFoundError(errno.ENOENT, "weights")]
)
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error), match=re.escape(str(error))), memory.explained("caae", CPU):
        raise error


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from semformer import pipeline
from semformer.config import load_config
from semformer.stages import segmentor
from semformer.store import Store

torch.set_num_threads(1)
data, store, limit = sys.argv[1:]
sizes = {"image_size": 192, "class_dim": 256, "batch_size": 12, "epochs": 1}
config = load_config("micro", {f"caae.{name}": value for name, value in sizes.items()})
data, store, device = pipeline.open_data(config, data), Store(store), torch.device("cpu")
list(pipeline.find_or_pack(config, data, store, lambda told: None, lambda key, holder: None))
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + int(limit),) * 2)
(run,) = pipeline.run(config, data, store, device=device, progress=lambda report: None, until="caae")
print(run.artifact.info["history"]["pieces"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_batch_that_does_not_fit_is_divided(shapes, tmp_path):
    """A process with 220 MiB of address space to spare, where the batch needs 330: torch's allocator refuses."""
    command = [sys.executable, "-c", LIMITED, str(shapes), str(tmp_path / "store"), str(220 * 2**20)]
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # else each thread reserves 64 MiB
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "caae: batches are taken in 2 pieces: they do not fit into memory" in done.stderr
    assert done.stdout.strip() in ("[2]", "[4]", "[8]")


def test_peak_memory_of_each_stage_is_recorded(shapes, store):
    everything = [stage.name for stage in pipeline.STAGES]
    artifacts = run(shapes, store, until=everything)
    assert list(artifacts) == everything
    for artifact in artifacts.values():
        told = artifact.info["memory"]
        assert told["device"] == "cpu"
        assert told["name"]
        assert 50 * 2**20 < told["peak_bytes"] < 64 * 2**30


def test_the_memory_of_a_stage_is_not_that_of_the_stage_before(shapes, store):
    filled = []

    def fill(told):
        if told.stage == "caae" and not filled:
            filled.append(len(torch.ones(400 * 2**20, dtype=torch.uint8)))

    made = run(shapes, store, progress=fill)
    first, second = (made[stage].info["memory"]["peak_bytes"] for stage in ("caae", "segmentor"))
    assert first > second + 200 * 2**20


def test_peak_is_that_since_the_reset():
    memory.reset_peak(CPU)
    before = memory.peak(CPU)["peak_bytes"]
    filled = torch.ones(300 * 2**20, dtype=torch.uint8)
    with_it = memory.peak(CPU)["peak_bytes"]
    assert with_it > before + 250 * 2**20
    del filled
    assert memory.peak(CPU)["peak_bytes"] > with_it - 2**20, "a peak stays"
    memory.reset_peak(CPU)
    assert memory.peak(CPU)["peak_bytes"] < with_it - 250 * 2**20
