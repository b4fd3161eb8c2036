"""Old names of modules: they go on working with a DeprecationWarning, for code that imported inner modules."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "raydetect"
GONE = ("commands", "worker")  # folders whose modules have moved elsewhere
MOVED = {
    "archives.layouts": "archives.dataset_layouts",
    "archives.naming": "archives.path_patterns",
    "archives.parquet": "archives.formats.parquet",
    "archives.prefix": "archives.formats.loose_files",
    "archives.tar": "archives.formats.tar",
    "archives.tar_headers": "archives.formats.tar_headers",
    "archives.tar_index": "archives.formats.tar_index",
    "archives.unpacking": "archives.formats.decompression",
    "archives.unreadable": "archives.access",
    "archives.zip": "archives.formats.zip",
    "archives.zip_names": "archives.formats.zip_names",
    "artifact_record": "artifacts.record",
    "audit.telling": "audit.report_section",
    "blocks.anomaly_map": "blocks.maps.anomaly_map",
    "blocks.backbone": "blocks.backbones.backbone",
    "blocks.clip": "blocks.backbones.clip",
    "blocks.coreset": "blocks.coresets.coreset",
    "blocks.correspondence": "blocks.search.correspondence",
    "blocks.difference": "blocks.search.difference",
    "blocks.exact_search": "blocks.search.exact_search",
    "blocks.faiss_search": "blocks.search.faiss_search",
    "blocks.flows": "blocks.networks.flows",
    "blocks.fusion": "blocks.networks.fusion",
    "blocks.gaussian": "blocks.coresets.gaussian",
    "blocks.grad_cam": "blocks.maps.grad_cam",
    "blocks.group": "blocks.coresets.group",
    "blocks.image_flow": "blocks.networks.image_flow",
    "blocks.integers": "blocks.coresets.integer_embeddings",
    "blocks.losses": "blocks.networks.losses",
    "blocks.neighbors": "blocks.search.neighbors",
    "blocks.pasting": "blocks.augment.cut_and_paste",
    "blocks.patch_windows": "blocks.maps.patch_windows",
    "blocks.planted": "blocks.augment.simulated_defect",
    "blocks.product": "blocks.search.matrix_product",
    "blocks.prompts": "blocks.backbones.prompts",
    "blocks.pyramid": "blocks.backbones.patch_embeddings",
    "blocks.rows": "blocks.coresets.keyed_rows",
    "blocks.sync_norm": "blocks.networks.sync_norm",
    "blocks.synthesis": "blocks.augment.synthesis",
    "blocks.textures": "blocks.augment.textures",
    "blocks.timm_trunk": "blocks.backbones.timm_trunk",
    "blocks.unet": "blocks.networks.unet",
    "blocks.vision": "blocks.backbones.vision",
    "blocks.windows": "blocks.maps.windows",
    "check.judge": "check.evaluate",
    "check.places": "check.locations",
    "check.reading": "check.preview",
    "commands.audit": "cli.audit",
    "commands.calibrate": "cli.calibrate",
    "commands.door": "cli.options",
    "commands.evaluate": "cli.evaluate",
    "commands.export": "cli.export",
    "commands.report": "cli.report",
    "commands.scoring": "cli.running.run",
    "commands.verify": "cli.verify",
    "comparison": "cli.comparison",
    "console": "progress",
    "distributed.bank": "distributed.scoring.bank_actors",
    "distributed.board": "distributed.fitting.progress_actor",
    "distributed.dealing": "distributed.fitting.chunk_split",
    "distributed.fit": "distributed.fitting.fit",
    "distributed.ingest": "distributed.chunk_dataset",
    "distributed.remote_search": "distributed.scoring.remote_search",
    "distributed.score": "distributed.scoring.score",
    "distributed.serve_calls": "distributed.serving.replica_calls",
    "distributed.serve_desk": "distributed.serving.controller",
    "distributed.serve_loopback": "distributed.serving.loopback",
    "distributed.serve_replica": "distributed.serving.replica",
    "distributed.serve_run": "distributed.serving.run",
    "estimator": "python_api.estimator",
    "evaluation.scored": "evaluation.stored_scores",
    "fleet_record": "artifacts.fleet",
    "gateway.allow": "gateway.allowed_uris",
    "gateway.answers": "gateway.http.answers",
    "gateway.app": "gateway.http.app",
    "gateway.archive_runs": "gateway.runs.archive_runs",
    "gateway.bodies": "gateway.http.schemas",
    "gateway.desk": "gateway.backend",
    "gateway.document": "gateway.http.openapi",
    "gateway.examples": "gateway.http.examples",
    "gateway.guard": "gateway.http.limits",
    "gateway.refusals": "gateway.http.errors",
    "gateway.reports": "gateway.runs.reports",
    "gateway.rules": "gateway.single_images",
    "gateway.runner": "gateway.runs.runner",
    "gateway.stream": "planning.stream",
    "gateway.tokens": "gateway.http.tokens",
    "models": "python_api.models",
    "plan": "planning.plan",
    "report.foremost": "report.top_images",
    "report.make": "report.build",
    "serve_local": "local.serving",
    "sinks.agreement": "sinks.consistency",
    "sinks.flags": "sinks.archive_flags",
    "sinks.results": "sinks.run_progress",
    "spec": "config",
    "spec.audit": "config.audit",
    "spec.calibrate": "config.calibrate",
    "spec.evaluate": "config.evaluate",
    "spec.fit": "config.fit",
    "spec.jobs": "config.jobs",
    "spec.score": "config.score",
    "spec.serve": "config.serve",
    "spec.words": "config.shared",
    "storage.troubles": "storage.error_translation",
    "worker.artifact": "artifacts.store",
    "worker.bank": "artifacts.sharded_bank",
    "worker.cache": "fitting.image_cache",
    "worker.calibrate": "fitting.calibrate",
    "worker.checkpoints": "fitting.checkpoints",
    "worker.collect": "fitting.collect",
    "worker.depth": "images.bit_depth",
    "worker.direct": "python_api.in_process",
    "worker.evaluate": "evaluation.labelled_images",
    "worker.exif": "images.orientation",
    "worker.fit": "fitting.worker",
    "worker.fleet": "fitting.fleet",
    "worker.given": "python_api.inputs",
    "worker.holdout": "fitting.holdout",
    "worker.jpeg": "images.jpeg",
    "worker.judge": "scoring.decision",
    "worker.masks": "images.masks.decoding",
    "worker.one_fit": "fitting.fit_run",
    "worker.pages": "images.pages",
    "worker.phases": "fitting.timings",
    "worker.preprocess": "images.decode",
    "worker.read": "archives.chunks",
    "worker.recalibrate": "fitting.recalibrate",
    "worker.scale": "fitting.ensemble_scale",
    "worker.score": "scoring.scorer",
    "worker.shared_errors": "fitting.shared_errors",
    "worker.tensor_file": "artifacts.tensor_file",
    "worker.tiff": "images.tiff",
    "worker.train": "fitting.train",
    "worker.warm": "scoring.scorer_pool",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module by its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a stand-in; None for every other name."""
        old = fullname.removeprefix(f"{PACKAGE}.")
        if old == fullname or (old not in MOVED and old not in GONE):
            return None
        return ModuleSpec(fullname, self, is_package=old in GONE or any(name.startswith(f"{old}.") for name in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        """Fills the stand-in: its names are those of the module at its new place."""
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        if old in GONE:
            return
        new = f"{PACKAGE}.{MOVED[old]}"
        warnings.warn(f"{module.__name__} is {new} now. Import that.", DeprecationWarning, stacklevel=2)
        moved = importlib.import_module(new)
        module.__dict__.update({name: value for name, value in vars(moved).items() if not name.startswith("__")})


def install() -> None:
    """Adds the finder behind Python's own, once."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())


def names_of(package: str, module: str) -> Callable[[str], Any]:
    """A package's `__getattr__` for the public names of the module that once had the package's name."""

    def find(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(module), name)
        warnings.warn(f"{package}.{name} is in {module} now. Import it from there.", DeprecationWarning, stacklevel=2)
        return found

    return find
