"""Checks every detector on one GPU: `python -m jobs.bench.gpu`. Needs neither Ray nor any package beyond `NEEDED`.

Each detector is fitted on the CPU with its smoke preset, on generated images and random weights, and moved to the
device; it is also fitted there. With float32 products on both sides (no TF32), its scores and maps must agree with the
CPU's, the nearest rows of its memory bank must be the same up to ties, and no operation of a second call may touch
another device.
Then images/s are measured with torch's default precision and compared with a floor: the time that the counted FLOPs and
the least traffic (weights, images and maps once) take at the rates of one matrix product and one copy of this run.

`--device cpu` rehearses all of it without a GPU: a detector against a second copy of it, loaded from its tensors.
Exits with 1 if a check fails, and with 2 if there is no GPU.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

NEEDED = (
    *("torch", "torchvision", "numpy", "pillow", "pydantic", "pyyaml", "safetensors"),
    *("fsspec", "simplejpeg", "zstandard"),
)
"""Distributions that must be installed; each brings its own requirements."""
ALSO = {"winclip": "open_clip_torch"}
"""Distributions that one detector needs in addition; without them it is left out."""
SIZE_PX, BATCH, IMAGES = 64, 16, 24
ROUNDS = 10
TOLERANCE = 1e-3
"""Largest allowed difference of scores and of maps, as a share of the CPU's largest absolute value."""
MAP_TOLERANCE = {"devnet": 2e-2, "differnet": 5e-2}
"""The same for maps that are gradients: where rounding moves a unit across a ReLU's zero, a whole path is on or off."""
DISTANCE_TOLERANCE = 1e-6
"""Neighbours are equal up to ties if they are as far as the CPU's, up to this share."""
QUERIES, NEIGHBOURS = 256, 3


@dataclass(frozen=True)
class Rates:
    """What the device reaches in this run."""

    flops_per_second: float
    bytes_per_second: float


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.gpu", description="checks every detector on one GPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu = a rehearsal without a GPU")
    parser.add_argument("--detectors", nargs="+", metavar="NAME", help="only these; nothing is written then")
    return parser.parse_args(argv)


def chosen_params(name: str) -> dict[str, Any]:
    """The smoke preset's changes: random weights wherever the detector has a backbone, and small images."""
    from raydetect.detectors._registry import build_detector, detector_class

    params: dict[str, Any] = {"image_size": [SIZE_PX, SIZE_PX]}
    has_weights = "weights" in {field.name for field in fields(detector_class(name).Params)}
    if has_weights and getattr(build_detector(name, {}, preset="smoke").params, "backbone", "its own") is not None:
        params["weights"] = "random"
    return params


def fitted(name: str, device: Any) -> Any:
    """The detector, fitted on a device with its smoke preset."""
    from raydetect.blocks.coresets.group import Group
    from raydetect.config import FitSpec
    from raydetect.config.validation import validate
    from raydetect.detectors._registry import detector_class
    from raydetect.fitting.fit_run import FitRun
    from raydetect.fitting.image_cache import CachedImage, ImageCache
    from raydetect.fitting.reading.counts import ReadFacts
    from raydetect.fitting.timings import Phases
    from raydetect.images.preprocess import Preprocess
    from tests.builders.images import DEFECTS, defect_image, normal_image
    from tests.builders.other_images import other_images

    cache = ImageCache(Preprocess((SIZE_PX, SIZE_PX)))
    for number in range(IMAGES):
        cache.add(CachedImage(f"normal-{number:03d}", 0, None), normal_image(number, SIZE_PX))
        if number % 4 == 0:
            image_HWC, _ = defect_image(number, DEFECTS[number // 4 % len(DEFECTS)], SIZE_PX)
            cache.add(CachedImage(f"defect-{number:03d}", 1, None), image_HWC)
    job: dict[str, Any] = {
        "kind": "fit",
        "source": {"uri": "generated images"},
        "detector": {"name": name, "preset": "smoke", "params": chosen_params(name)},
        "artifact": "not saved",
        "batch_size": BATCH,
        "calibration": {"holdout_ratio": 0.2},
    }
    if detector_class(name).info.auxiliary == "other categories":
        job["auxiliary"] = {"uri": "generated images"}
    spec = validate(FitSpec, job, name)
    auxiliary = other_images(IMAGES, SIZE_PX) if "auxiliary" in job else None
    run = FitRun(spec, None, Group(), cache, None, lambda *_: None, device, "generated images", Phases(), auxiliary)
    return run.fit(ReadFacts()).detector


def copied(detector: Any, name: str, device: Any) -> Any:
    """A second detector with the tensors of a fitted one, moved to a device."""
    from raydetect.detectors._registry import build_detector

    copy = build_detector(name, chosen_params(name), preset="smoke")
    copy.load_tensors({key: value.clone() for key, value in detector.tensors().items()})
    return copy.to(device)


def batch() -> Any:
    """Normal and defective images that no detector was fitted on, uint8 (B, 3, H, W), on the CPU."""
    import numpy as np
    import torch

    from tests.builders.images import DEFECTS, defect_image, normal_image

    images = [normal_image(90_000 + i, SIZE_PX) for i in range(BATCH // 2)]
    images += [defect_image(500 + i, DEFECTS[i % len(DEFECTS)], SIZE_PX)[0] for i in range(BATCH - BATCH // 2)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def scored(detector: Any, images_BCHW: Any) -> Any:
    """Scores as jobs do."""
    import torch

    with torch.inference_mode():
        return detector.score(images_BCHW)


@contextmanager
def plain_float32() -> Iterator[None]:
    """Convolutions in float32, as products are by default; torch's default for them is TF32 on GPUs that have it."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def difference(found: Any, reference: Any) -> float:
    """Largest difference of two tensors as a share of the reference's largest absolute value."""
    reference = reference.double()
    return float((found.cpu().double() - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def searches(detector: Any) -> list[Any]:
    """The memory banks of a detector."""
    from raydetect.blocks.search.search import Search

    found = [
        item for value in vars(detector).values() for item in (value.values() if isinstance(value, dict) else [value])
    ]
    found += [item.search for item in found if hasattr(item, "search") and not isinstance(item, Search)]
    return [item for item in found if isinstance(item, Search)]


def neighbours(moved: Any, reference: Any) -> dict[str, Any]:
    """Nearest rows of both detectors' memory banks, for rows of the bank with noise."""
    import torch

    worst, ties, count = 0.0, 0, 0
    for here, there in zip(searches(reference), searches(moved), strict=True):
        generator = torch.Generator().manual_seed(0)
        rows_ND = here.bank()[torch.randint(here.num_rows, (QUERIES,), generator=generator)]
        queries_ND = rows_ND + 0.1 * rows_ND.std() * torch.randn(rows_ND.shape, generator=generator)
        k = min(NEIGHBOURS, here.num_rows)
        distance_NK, index_NK = here.nearest(queries_ND, k)
        far_NK, other_NK = (tensor.cpu() for tensor in there.nearest(queries_ND.to(there.bank().device), k))
        gap_NK = (far_NK.double() - distance_NK.double()).abs() / distance_NK.double().clamp_min(1e-30)
        worst, ties, count = (
            max(worst, float(gap_NK.max())),
            ties + int((index_NK != other_NK).sum()),
            count + gap_NK.numel(),
        )
    return {"neighbours": count, "other_rows": ties, "distances": worst}


def elsewhere(detector: Any, images_BCHW: Any) -> list[str]:
    """Operations of a second call that take or return a tensor on another device."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    found: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            if any(tensor.device.type != images_BCHW.device.type for tensor in tensors):
                found.add(str(func))
            return result

    scored(detector, images_BCHW)
    with Watch():
        scored(detector, images_BCHW)
    return sorted(found)


def waits(detector: Any, images_BCHW: Any) -> int | None:
    """How often a call waits for the device, counted by torch; None on the CPU."""
    import torch

    if images_BCHW.device.type != "cuda":
        return None
    scored(detector, images_BCHW)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            scored(detector, images_BCHW)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told)


def seconds(work: Callable[[], Any], device: Any, of: Callable[[list[float]], float] = statistics.median) -> float:
    """Median (or least) time of a call, with all of its work on the device."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    times = []
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return of(times)


def measured_rates(device: Any) -> Rates:
    """FLOPs/s of a matrix product at the best precision that torch's defaults use, and bytes/s of a copy."""
    import torch

    side, length = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 24)
    from raydetect.blocks.search.matrix_product import product

    square, line = torch.randn(side, side, device=device), torch.ones(length, device=device)
    target = torch.empty_like(line)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as in convolutions, so that the floor is no lower than it may be
    try:
        multiply = seconds(lambda: product(square, square), device, min)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    copy = seconds(lambda: target.copy_(line), device, min)
    return Rates(2 * side**3 / multiply, 2 * line.nbytes / copy)


def speed(detector: Any, images_BCHW: Any, rates: Rates) -> dict[str, float]:
    """Images/s, and the time of a batch over its floor.

    The time may be below the floor: FLOPs are those of direct convolutions, and libraries know quicker ones (Winograd).
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter: Any = FlopCounterMode(display=False)
    # without counts by module, whose hooks forbid autograd.grad
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda: None)
    with counter:
        scores = scored(detector, images_BCHW)
    least_bytes = sum(tensor.nbytes for tensor in detector.tensors().values())
    least_bytes += images_BCHW.nbytes + scores.anomaly_map_BHW.nbytes
    floor = max(counter.get_total_flops() / rates.flops_per_second, least_bytes / rates.bytes_per_second)
    took = seconds(lambda: scored(detector, images_BCHW), images_BCHW.device)
    return {
        "images_per_second": round(len(images_BCHW) / took, 1),
        "gflops_per_image": round(counter.get_total_flops() / len(images_BCHW) / 1e9, 4),
        "least_megabytes": round(least_bytes / 1e6, 2),
        "time_over_floor": round(took / floor, 1),
    }


def checked(name: str, device: Any, rates: Rates) -> dict[str, Any]:
    """All figures of one detector; `failures` names the checks that failed."""
    import torch

    start = time.perf_counter()
    reference = fitted(name, torch.device("cpu"))
    moved, images_BCHW = copied(reference, name, device), batch()
    there_BCHW = images_BCHW.to(device)
    with plain_float32():
        expected, found = scored(reference, images_BCHW), scored(moved, there_BCHW)
    default = scored(moved, there_BCHW)
    figures: dict[str, Any] = {
        "score_difference": difference(found.image_score_B, expected.image_score_B),
        "map_difference": difference(found.anomaly_map_BHW, expected.anomaly_map_BHW),
        "score_difference_by_default": difference(default.image_score_B, expected.image_score_B),
        "map_difference_by_default": difference(default.anomaly_map_BHW, expected.anomaly_map_BHW),
        **neighbours(moved, reference),
        "elsewhere": elsewhere(moved, there_BCHW),
        "waits": waits(moved, there_BCHW),
        **speed(moved, there_BCHW, rates),
    }
    there = scored(fitted(name, device), there_BCHW)
    figures["fitted_there_is_finite"] = bool(
        there.image_score_B.isfinite().all() & there.anomaly_map_BHW.isfinite().all()
    )
    figures["seconds"] = round(time.perf_counter() - start, 1)
    return {**figures, "failures": failures(name, figures)}


def failures(name: str, figures: dict[str, Any]) -> list[str]:
    """The checks that failed."""
    passed = {
        "scores": figures["score_difference"] <= TOLERANCE,
        "map": figures["map_difference"] <= MAP_TOLERANCE.get(name, TOLERANCE),
        "neighbours": figures["distances"] <= DISTANCE_TOLERANCE,
        "one device": not figures["elsewhere"],
        "fit on the device": figures["fitted_there_is_finite"],
    }
    return [check for check, is_met in passed.items() if not is_met]


def table(found: dict[str, dict[str, Any]]) -> str:
    """One line per detector."""
    lines = [f"{'detector':<11}{'scores':>9}{'maps':>9}{'rows':>6}{'waits':>6}{'images/s':>10}{'x floor':>9}  result"]
    for name, figures in found.items():
        if "left_out" in figures:
            lines.append(f"{name:<11}left out: {figures['left_out']}")
            continue
        waited = "-" if figures["waits"] is None else figures["waits"]
        lines.append(
            f"{name:<11}{figures['score_difference']:>9.1e}{figures['map_difference']:>9.1e}{figures['other_rows']:>6}"
            f"{waited:>6}{figures['images_per_second']:>10}{figures['time_over_floor']:>9}  "
            + (f"FAILED: {', '.join(figures['failures'])}" if figures["failures"] else "ok")
        )
    return "\n".join(lines)


def run(device_name: str, names: Sequence[str]) -> dict[str, Any]:
    """Checks detectors and returns all figures."""
    import torch

    device = torch.device(device_name)
    start, rates, found = time.perf_counter(), measured_rates(device), dict[str, dict[str, Any]]()
    for name in names:
        try:
            found[name] = checked(name, device, rates)
        except ModuleNotFoundError as error:
            found[name] = {
                "left_out": f"there is no package {error.name} ({ALSO.get(name, 'see the list of packages')})"
            }
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tflops": round(rates.flops_per_second / 1e12, 2),
        "gigabytes_per_second": round(rates.bytes_per_second / 1e9, 1),
        "batch": BATCH,
        "seconds": round(time.perf_counter() - start, 1),
        "detectors": found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; see the module docstring."""
    given = arguments(argv)
    print(f"Packages: {', '.join(NEEDED)}; {', '.join(f'{p} for {n} alone' for n, p in ALSO.items())}", flush=True)
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; `--device cpu` rehearses the check on the CPU.", file=sys.stderr)
        return 2
    from raydetect.detectors._registry import list_models

    figures = run(given.device, given.detectors or list_models())
    found = figures["detectors"]
    print(f"\n{table(found)}\n{len(found)} detectors in {figures['seconds']} s on {figures['device']}")
    if given.device == "cuda" and not given.detectors:
        from jobs.bench.record import write

        write("gpu", "python -m jobs.bench.gpu", figures)
    return int(any(one.get("failures") for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
