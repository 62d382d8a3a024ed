"""Time linear_attn against softmax attention and other peers: `python -m benchmarks.op [--shapes ...] [--save FILE]`.

Prints one table a shape: milliseconds (median, 20th and 80th percentile), the ratio to ours and, on CUDA, the peak
memory. A peer that cannot run here is named with the reason.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from benchmarks import baselines
from benchmarks.shapes import CPU, SHAPES, SWEEP, WAN
from linvideo.evaluation.latency import device_name, time_call
from linvideo.ops import linear_attn


def contenders(q_weight: torch.Tensor, k_weight: torch.Tensor, cuda: bool) -> dict:
    """Name -> function that builds the call (and may raise ImportError)."""

    def ours(feature_map, **weights):
        return lambda: lambda q, k, v: linear_attn(q, k, v, feature_map=feature_map, **weights)

    rows = {
        "ours hedgehog": ours("hedgehog", q_weight=q_weight, k_weight=k_weight),
        "ours elu": ours("elu"),
    }
    for name, backend in baselines.BACKENDS.items():
        if cuda or name == "softmax flash":
            rows[name] = lambda b=backend: baselines.softmax(b)
    rows["eager hedgehog"] = lambda: baselines.eager_linear(q_weight, k_weight)
    rows["compiled eager hedgehog"] = lambda: torch.compile(baselines.eager_linear(q_weight, k_weight))
    if cuda:
        rows["fla chunk_linear_attn (causal, no map)"] = baselines.fla_causal
    return rows


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, backward: bool) -> list[dict]:
    batch, tokens, heads, dim = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, heads, dim, device=device, dtype=dtype, requires_grad=True) for _ in "qkv")
    weights = [(torch.eye(dim, device=device) + 0.02 * torch.randn(heads, dim, dim, device=device)) for _ in "qk"]
    weights = [w.to(dtype).requires_grad_() for w in weights]
    gradient = torch.randn_like(q)
    rows = []
    for name, build in contenders(*weights, cuda=device == "cuda").items():
        row = {"name": name}
        try:
            call = build()
            with torch.no_grad():
                row["forward"] = time_call(lambda c=call: c(q, k, v), device)
            if backward:
                inputs = [q, k, v] + (weights if "hedgehog" in name else [])

                def both(c=call, i=inputs):
                    return torch.autograd.grad(c(q, k, v), i, gradient)

                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                row["forward+backward"] = time_call(both, device)
                if device == "cuda":
                    row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        except (RuntimeError, ImportError) as error:
            row["absent"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
        rows.append(row)
    return rows


def print_table(name: str, shape: tuple, rows: list[dict], backward: bool) -> None:
    print(f"\n{name}: batch {shape[0]}, {shape[1]} tokens, {shape[2]} heads of {shape[3]}")
    columns = ["forward"] + (["forward+backward"] if backward else [])
    for row in rows:
        if "absent" in row:
            print(f"  {row['name']:40s} absent ({row['absent']})")
            continue
        cells = []
        for column in columns:
            median, p20, p80 = row[column]
            ratio = median / rows[0][column].median if column in rows[0] else float("nan")
            cells.append(f"{column} {median:9.3f} ms ({p20:.3f}..{p80:.3f}) {ratio:7.2f}x ours")
        if "peak_mib" in row:
            cells.append(f"peak {row['peak_mib']:.0f} MiB")
        print(f"  {row['name']:40s} " + "   ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(WAN | SWEEP if cuda else CPU))
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--forward_only", action="store_true")
    parser.add_argument("--save", type=Path, help="also write the rows as JSON to this file, which must not exist")
    args = parser.parse_args()
    if args.save and args.save.exists():
        parser.error(f"{args.save} exists; results are never overwritten")
    device = "cuda" if cuda else "cpu"
    header = {
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "date": time.strftime("%Y-%m-%d"),
        "unit": "ms: median, p20, p80",
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    results = {}
    for name in args.shapes:
        rows = measure(SHAPES[name], getattr(torch, args.dtype), device, not args.forward_only)
        print_table(name, SHAPES[name], rows, not args.forward_only)
        results[name] = {"shape": SHAPES[name], "rows": rows}
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        aside = args.save.with_name(args.save.name + ".writing")
        aside.write_text(json.dumps(header | {"results": results}, indent=1))
        os.replace(aside, args.save)


if __name__ == "__main__":
    main()
