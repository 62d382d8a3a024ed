"""The static gates: the kernels are compiled ahead of time, without a GPU, and the machine code is checked."""

import inspect
import json
import os
import re
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("tests/aot compiles, which TRITON_INTERPRET=1 prevents", allow_module_level=True)
triton = pytest.importorskip("triton", reason="tests/aot needs triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from linvideo_kernels.linear_attn import configs  # noqa: E402
from linvideo_kernels.linear_attn.aot import OPTIONS, CompileJob, compile_jobs, gpu_target  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks import static_gates  # noqa: E402
from benchmarks.host_calls import Driver  # noqa: E402

SAMPLE = static_gates.sample(list(static_gates.ARCHITECTURES))


def name(job: CompileJob) -> str:
    return job.name


@pytest.mark.parametrize("job", SAMPLE, ids=name)
def test_gates(job):
    code, found = static_gates.check(job)
    print(static_gates.HEADER, static_gates.line(job, code, found), sep="\n")
    assert not {gate: what for gate, what in found.items() if not static_gates.excused(gate, job.name)}


def functions() -> list:
    """Return every jit function of the package: the kernels and the functions that they call."""
    modules = [module for key, module in sys.modules.items() if key.startswith("linvideo_kernels.linear_attn.")]
    found = {id(value): value for module in modules for value in vars(module).values()}
    return [value for value in found.values() if isinstance(value, triton.JITFunction)]


def test_the_sample_is_small_and_holds_every_kernel_option_and_map():
    """At most 350 jobs contain every jit function that runs as a program, each option and each feature map."""
    kernels = {function.__name__ for function in functions() if "tl.program_id" in inspect.getsource(function.fn)}
    assert kernels == {job.launch.kernel.__name__ for job in SAMPLE} and len(kernels) == 10
    assert len(SAMPLE) <= 350
    assert all(any(option in job.name for job in SAMPLE) for option in OPTIONS)
    assert all(any(f"-{feature_map}-" in job.name for job in SAMPLE) for feature_map in static_gates.MAPS)
    for dim in ("d64", "d128"):
        amd = {job.launch.kernel.__name__ for job in SAMPLE if f"-{dim}-bf16-gfx942-" in job.name}
        assert amd == kernels - {"mix_grad", "rotate_rows", "merge_rows", "merge_factors"}


TARGETS = {90: ("cuda", 90, 32), 942: ("hip", "gfx942", 64), 1100: ("hip", "gfx1100", 32)}  # as drivers name them


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("options", [(), ("rope", "mix"), ("key_mask", "packed")], ids="-".join)
def test_a_launch_finds_what_was_compiled_ahead_of_time(options, capability, monkeypatch):
    """Source, options and target are equal: a launch finds the entry in Triton's cache, and the gates apply to it."""
    gpu = Driver(GPUTarget(*TARGETS[capability]))
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    backend = triton.compiler.make_backend(gpu.get_current_target())
    assert gpu.target == gpu_target(capability)
    for job in compile_jobs(128, "hedgehog", torch.bfloat16, capability, options=options):
        kernel, tile, args, constexprs = job.launch
        monkeypatch.setattr(kernel, "device_caches", {0: kernel.create_binder()})  # for this driver
        compiled = []
        monkeypatch.setattr(kernel, "compile", lambda *source, compiled=compiled, **how: compiled.append((source, how)))
        kernel.run(*args, grid=(1,), warmup=True, **constexprs, **tile.options)
        (((source, *_), how),) = compiled
        assert source.hash() == job.source().hash(), job.name
        ours, launched = (backend.parse_options(dict(given)) for given in (tile.options, how["options"]))
        assert ours.hash() == launched.hash(), job.name


ATOMICS = r"\b(atom|red)\."  # in PTX


def test_kernels_use_no_atomics():
    """Sums have a fixed order, so the same input gives the same bits. Checked in every source and in the PTX."""
    names = {function.__name__ for function in functions()}
    assert names > {job.launch.kernel.__name__ for job in SAMPLE}  # includes helpers
    for function in functions():
        source = inspect.getsource(function.fn)
        assert "atomic" not in source and "autotune" not in source, function.__name__
    compiled = set()
    for options in (("rope", "mix"), ("window",)):
        for job in compile_jobs(128, "hedgehog", torch.bfloat16, 90, options=options):
            assert not re.search(ATOMICS, job.compile().asm["ptx"]), job.name
            compiled.add(job.launch.kernel.__name__)
    assert compiled == {job.launch.kernel.__name__ for job in SAMPLE}


@triton.jit
def helper(ptr):
    tl.atomic_add(ptr, 1)


@triton.jit
def counting(ptr):
    helper(ptr)


def test_an_atomic_in_a_helper_shows_in_the_ptx():
    source = triton.compiler.ASTSource(counting, {"ptr": "*i32"})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert re.search(ATOMICS, compiled.asm["ptx"])


def test_no_minimum_hides_a_nan():
    """min.f32 and max.f32 return the operand that is not NaN; only the softmax-like maps may use them."""
    for feature_map in ("elu", "relu"):
        checked = set()
        for job in compile_jobs(64, feature_map, torch.bfloat16, 90):
            if job.launch.kernel.__name__ in ("accumulate_state", "map_grad"):
                ptx = job.compile().asm["ptx"]
                assert "min.f32" not in ptx and "max.f32" not in ptx, job.name
                checked.add(job.launch.kernel.__name__)
        assert checked == {"accumulate_state", "map_grad"}


# The tests below show that each gate can fail.


def broken(kernel: str, dtype=torch.bfloat16, capability: int = 90, **tile) -> dict[str, str]:
    """Return the faults of a kernel (D = 128, hedgehog) with another tile."""
    table = configs.tile
    try:
        configs.tile = lambda name, *args: table(name, *args)._replace(**tile) if name == kernel else table(name, *args)
        jobs = [j for j in compile_jobs(128, "hedgehog", dtype, capability) if j.launch.kernel.__name__ == kernel]
    finally:
        configs.tile = table
    assert jobs
    return {gate: what for job in jobs for gate, what in static_gates.check(job)[1].items()}


@pytest.mark.parametrize(
    "gate, kernel, tile",
    [
        ("spills", "apply_state", {"block": 128, "warps": 4}),
        ("shared", "accumulate_state", {"block": 128, "warps": 8, "stages": 3, "tma": False}),
        ("exponentials", "apply_state", {"block": 64, "warps": 8}),
        ("resident", "map_grad", {"resident": 2}),
        ("overlap", "map_grad", {"block": 64, "warps": 8, "stages": 2}),
        ("overlap", "accumulate_state", {"block": 128, "warps": 8, "stages": 1, "tma": True}),
        ("spills", "apply_state", {"capability": 942, "block": 64, "warps": 8}),
        ("exponentials", "apply_state", {"capability": 942, "block": 32, "warps": 4}),
        ("shared", "accumulate_state", {"capability": 942, "stages": 3, "value_first": True}),
    ],
)
def test_a_bad_tile_fails_its_gate(gate, kernel, tile):
    assert gate in broken(kernel, **tile)


@pytest.mark.parametrize(
    "kernel, tile",
    [
        ("map_grad", {"block": 64, "warps": 8, "stages": 3}),  # loads two tiles ahead
        ("accumulate_state", {"block": 64, "warps": 4, "stages": 3, "tma": True}),
        ("project_grad", {"block": 64, "warps": 4, "stages": 2}),  # another program computes meanwhile
    ],
)
def test_loads_that_something_hides_pass_the_gate(kernel, tile):
    assert "overlap" not in broken(kernel, **tile)


def test_products_on_cuda_cores_fail_the_gate():
    job = next(j for j in compile_jobs(128, "hedgehog", torch.float32, 90) if "apply_state" in j.name)
    job = job._replace(name=job.name.replace("fp32", "bf16"))  # as if it were meant for tensor cores
    assert "matrix" in static_gates.check(job)[1]


def test_several_stages_fail_on_sm_100_until_a_triton_is_proven(monkeypatch):
    job = next(job for job in SAMPLE if job.capability == 100 and "project_grad" in job.name)
    code = static_gates.check(job)[0]
    assert "stages" not in static_gates.faults(job, code)
    job = job._replace(launch=job.launch._replace(tile=job.launch.tile._replace(stages=2)))
    assert "stages" in static_gates.faults(job, code)
    for proven, fails in ((99, 0), True), ((3, 0), False):
        monkeypatch.setattr(static_gates, "TCGEN05_STAGES_SINCE", proven)
        assert ("stages" in static_gates.faults(job, code)) == fails


def test_a_hazard_fails_its_gate():
    job = next(job for job in SAMPLE if job.capability == 90 and "apply_state" in job.name)
    code = static_gates.check(job)[0]
    assert code.hazards == [] and "hazard" in static_gates.faults(job, code._replace(hazards=["0x10 FADD"]))


def test_ptxas_is_the_one_that_triton_uses():
    """sm_100 and above have a ptxas of their own."""
    for capability in static_gates.ARCHITECTURES.keys() - configs.AMD.keys():
        text = triton.backends.nvidia.compiler.get_ptxas(capability).version
        assert static_gates.ptxas_version(capability).startswith(text)


def test_a_compiler_error_is_a_fault_and_not_a_crash(monkeypatch):
    def fail(self):
        raise RuntimeError("ptxas\nand its whole program")

    monkeypatch.setattr(CompileJob, "compile", fail)
    assert static_gates.check(SAMPLE[0]) == (None, {"compile": "RuntimeError: ptxas"})


def test_command_prints_writes_and_never_overwrites(tmp_path, monkeypatch, capsys):
    target = tmp_path / "gates.json"
    arguments = ["static_gates", "--arch", "sm_90", "--match", "reduce_state-hedgehog-d64-*", "--json", str(target)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        static_gates.main()
    assert end.value.code == 0 and "kernels pass" in capsys.readouterr().out
    written = json.loads(target.read_text())
    assert written["ptxas"] == {"sm_90": static_gates.ptxas_version(90)}
    rows = written["kernels"]
    assert len(rows) >= 2 and all(row["registers"] > 0 and row["faults"] == {} for row in rows)
    with pytest.raises(SystemExit) as end:
        static_gates.main()
    assert end.value.code == 2 and "never overwritten" in capsys.readouterr().err
