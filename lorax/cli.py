"""The command line: `lorax inspect | similarity | transfer | migrate | convert | evaluate | cache`."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import bar, plain, png, print_migration, print_plan, print_report, print_similarity, say, warn
from .entry import run
from .errors import FileError, OptionError, printable
from .options import LORA_RANK, Choice, DType, Format, Naming, Run, TransferOptions
from .version import __version__

if TYPE_CHECKING:
    import torch

    from .compute.engine import Engine
    from .models.base import Base

app = typer.Typer(
    help="Move adapters (LoRA, LoRA-X) between diffusion base models, without training and without data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


caches = typer.Typer(help="What is kept of earlier work, so that no layer is decomposed twice.", no_args_is_help=True)
app.add_typer(caches, name="cache")


class Device(Choice):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


AdapterFile = Annotated[Path, typer.Argument(help="Adapter, a safetensors file.")]
BASE = "Checkpoint, file of a U-Net or transformer (GGUF too), or folder of a diffusers pipeline."
SourceOption = Annotated[Path, typer.Option("--source", help=f"Base that the adapter was made for. {BASE}")]
TargetOption = Annotated[Path, typer.Option("--target", help=f"Base that it shall work on. {BASE}")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="File to write; an older one is replaced.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done; no weight is read but to pair blocks.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write a page to look at in a browser.")]
CacheOption = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Take subspaces and scores from the cache, and keep new ones there.")
]
OPTIONS = {option.name: option for option in fields(TransferOptions)}


def _told(name: str, panel: str | None = None) -> Any:
    """Return what the command line says of an option of a transfer."""
    text, shown = OPTIONS[name].metadata["help"], OPTIONS[name].metadata.get("shown", True)
    spelled = f"--{name.replace('_', '-')}"  # told, so that a switch gets no --no-...
    return typer.Option(spelled, help=text, show_default=shown, rich_help_panel=panel)


RankOption = Annotated[int | None, _told("rank")]
NamingOption = Annotated[Naming, _told("naming")]
DTypeOption = Annotated[DType, _told("dtype")]


def transfer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `TransferOptions`, in place of its parameter `options`."""

    @wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in OPTIONS}
        command(options=TransferOptions(**chosen), **given)

    options = [
        Parameter(
            name,
            Parameter.POSITIONAL_OR_KEYWORD,
            default=option.default,
            annotation=Annotated[option.type, _told(name, "How it is moved")],
        )
        for name, option in OPTIONS.items()
    ]
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        parameters += options if parameter.name == "options" else [parameter]
    run.__signature__ = signature(command).replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False) -> None:
    if version:
        say.print(__version__)
        raise typer.Exit


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Adapter or base model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all there is to know as JSON.")] = False,
) -> None:
    """Say what a file is: format, family, layers, ranks, alpha, norms, dtype."""
    from .inspect import describe

    facts = describe(file)
    if as_json:
        say.print(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name not in ("rows", "metadata", "unused"):
            table.add_row(name.replace("_", " "), plain(value))
    say.print(table)
    for key, why in facts.get("unused", {}).items():
        say.print(f"not used: {printable(key)} ({printable(why)})")


@app.command()
def similarity(
    source: Annotated[Path, typer.Argument(help=BASE)],
    target: Annotated[Path, typer.Argument(help=BASE)],
    rank: Annotated[str, typer.Option(help="Compare this many leading directions, or 'full'.")] = "full",
    layers: Annotated[str, typer.Option(help="'attention' or 'all'.")] = "attention",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every pair to this file.")] = None,
    png_file: Annotated[Path | None, typer.Option("--png", help="Draw the heat maps to this file.")] = None,
    html_file: HtmlOption = None,
    device: DeviceOption = Device.auto,
    cache: CacheOption = True,
) -> None:
    """Compare the singular subspaces of two bases: every source layer with every target layer of its kind."""
    from .compare.matching import match_bases
    from .compare.similarity import compare_bases, shared_kinds
    from .compute.engine import or_on_cpu
    from .files.output import write_bytes
    from .models.base import open_base
    from .show.page import page
    from .show.view import similarity_view
    from .transfer.report import check_json, similarity_json

    if layers not in ("attention", "all"):
        raise OptionError("unknown choice of layers", layers, "choose attention or all")
    if rank != "full" and not re.fullmatch("[0-9]{1,9}", rank):
        raise OptionError("a rank is a whole number or 'full'", rank, "give for example 320")
    base_s, base_t = open_base(source), open_base(target)
    _check_outputs([json_file, png_file, html_file], base_s, base_t)
    if json_file:
        check_json(shared_kinds(base_s, base_t, attention_only=layers == "attention").values())
    engine = _engine(device, cache)
    with bar("comparing") as progress:
        result = or_on_cpu(
            lambda engine: compare_bases(
                base_s,
                base_t,
                rank=None if rank == "full" else int(rank),
                attention_only=layers == "attention",
                engine=engine,
                progress=progress,
            ),
            engine,
        )
    print_similarity(result)
    if json_file:
        write_bytes(json_file, json.dumps(similarity_json(result)).encode())
    if png_file:
        write_bytes(png_file, png(result))
    if html_file:
        pairs = or_on_cpu(lambda engine: match_bases(base_s, base_t, scores=result.scores, engine=engine), engine)
        write_bytes(html_file, page(similarity_view(result, base_s, base_t, pairs)).encode())


@app.command()
@transfer_options
def transfer(
    adapter: AdapterFile,
    source: SourceOption,
    target: TargetOption,
    output: OutputOption,
    options: TransferOptions,
    assignment_file: Annotated[
        Path | None, typer.Option("--assignment", help="Take the pairs of blocks from this file (or report).")
    ] = None,
    save_assignment: Annotated[
        Path | None, typer.Option(help="Write the pairs of blocks to this file, to look at, edit and give back.")
    ] = None,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write the report as JSON.")] = None,
    png_file: Annotated[Path | None, typer.Option("--png", help="Draw what each layer kept.")] = None,
    html_file: HtmlOption = None,
    device: DeviceOption = Device.auto,
    cache: CacheOption = True,
    dry_run: DryRunOption = False,
) -> None:
    """Move an adapter from its source base to a target base."""
    from .adapters import load_adapter, save_adapter
    from .compare.matching import load_assignment
    from .compute.engine import or_on_cpu
    from .files.output import write_bytes
    from .models.base import open_base
    from .show.page import page
    from .transfer.plan import plan_transfer
    from .transfer.run import transfer_adapter

    base_s, base_t = open_base(source), open_base(target)
    inputs = [adapter, *([assignment_file] if assignment_file else [])]
    _check_outputs([output, report_file, png_file, html_file, save_assignment], base_s, base_t, *inputs)
    assignment = load_assignment(assignment_file, base_s, base_t) if assignment_file else None
    loaded = load_adapter(adapter, base_s)
    if dry_run:
        with bar("planning") as progress:
            plan = or_on_cpu(
                lambda engine: plan_transfer(
                    loaded, base_s, base_t, options, assignment=assignment, engine=engine, progress=progress
                ),
                _engine(device, cache),
            )
        print_plan(plan)
        return
    with bar("transferring") as progress:
        result, report = or_on_cpu(
            lambda engine: transfer_adapter(
                loaded, base_s, base_t, options, assignment=assignment, engine=engine, progress=progress
            ),
            _engine(device, cache),
        )
    save_adapter(result, output)
    if report_file:
        write_bytes(report_file, json.dumps(report.to_json(), indent=1).encode())
    if save_assignment:
        write_bytes(save_assignment, json.dumps(report.assignment.to_json(), indent=1).encode())
    if png_file:
        write_bytes(png_file, png(report))
    if html_file:
        write_bytes(html_file, page(report.to_json()).encode())
    print_report(report)
    methods = ", ".join(f"{count} by {method}" for method, count in report.methods.items())
    say.print(printable(f"{output}: {methods or 'nothing was moved'}"), soft_wrap=True)


@app.command()
@transfer_options
def migrate(
    folder: Annotated[Path, typer.Argument(help="Folder of adapters, with all below it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; its structure is that of FOLDER.")],
    options: TransferOptions,
    source: Annotated[Path | None, typer.Option("--source", help=f"Base that they were made for. {BASE}")] = None,
    target: Annotated[Path | None, typer.Option("--target", help=f"Base that they shall work on. {BASE}")] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="TOML file with a table `move` for each pair of bases, instead of these two.")
    ] = None,
    where: Annotated[Run, typer.Option("--engine", help="Processes here, or a Ray cluster.")] = Run.local,
    workers: Annotated[
        int | None, typer.Option(help="How many processes.", show_default="cores, as memory allows")
    ] = None,
    gpu_share: Annotated[float, typer.Option(help="Ray: share of a GPU that a task takes.")] = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the migration in the output folder.")] = False,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write what became of each as JSON.")] = None,
    device: DeviceOption = Device.auto,
    cache: CacheOption = True,
    dry_run: DryRunOption = False,
) -> None:
    """Move a whole library of adapters; interrupted, it goes on where it was. Status 1 if any adapter failed."""
    from .files.output import check_output, write_bytes
    from .migration import dry_run as planned
    from .migration import input_files, output_files, plan_folder, plan_manifest
    from .migration import migrate as migrated

    if manifest and not source and not target:
        tasks = plan_manifest(manifest, folder, options, output)
    elif source and target and not manifest:
        tasks = plan_folder(folder, source, target, options, output)
    else:
        fix = "give --source and --target, or --manifest"
        raise OptionError("the bases are missing, or given twice", "see --source, --target, --manifest", fix)
    if dry_run:
        failed = 0
        for task, said, can_be in planned(tasks, engine=_engine(device, cache)):
            failed += not can_be
            say.print(printable(f"{task.name} -> {task.output}: {said}"), soft_wrap=True)
        raise typer.Exit(1 if failed else 0)
    inputs = [manifest] if manifest else []
    if report_file:
        check_output(report_file, [*input_files(tasks), *inputs], output_files(tasks, output))
    with bar("migrating") as progress:
        summary = migrated(
            tasks,
            output,
            engine=_engine(device, cache),
            run=where,
            workers=workers,
            gpu_share=gpu_share,
            resume=resume,
            inputs=inputs,
            progress=progress,
        )
    if report_file:
        write_bytes(report_file, json.dumps(summary.to_json(), indent=1).encode())
    print_migration(summary)
    if summary.count("failed"):
        raise typer.Exit(1)


@app.command()
def convert(
    adapter: AdapterFile,
    to: Annotated[Format, typer.Option("--to", help="Form of the result.")],
    output: OutputOption,
    source: Annotated[Path | None, typer.Option("--source", help=f"Base that the adapter was made for. {BASE}")] = None,
    rank: RankOption = None,
    naming: NamingOption = Naming.keep,
    dtype: DTypeOption = DType.keep,
    device: DeviceOption = Device.auto,
    cache: CacheOption = True,
) -> None:
    """Change the format of an adapter; its base stays the same."""
    from .adapters import load_adapter, save_adapter
    from .adapters.convert import KEEP_THE_LORA, convert_to_lora, convert_to_lora_x
    from .compare.scores import finite_mean
    from .compute.engine import or_on_cpu
    from .models.base import open_base
    from .transfer.report import WEAK

    base = open_base(source) if source else None
    _check_outputs([output], *([base] if base else []), adapter)
    loaded, engine = load_adapter(adapter, base), _engine(device, cache)
    with bar("converting") as progress:
        if to is Format.lora:
            most = LORA_RANK if rank is None else rank
            result = or_on_cpu(
                lambda engine: convert_to_lora(loaded, base, rank=most, engine=engine, progress=progress), engine
            )
        elif base is None:
            raise OptionError("a LoRA-X is made of its source base", "--source is missing", "give --source")
        else:
            result, shares = or_on_cpu(
                lambda engine: convert_to_lora_x(loaded, base, rank=rank, engine=engine, progress=progress), engine
            )
            mean = finite_mean(shares.values())
            say.print(f"{len(shares)} layers, {mean:.0%} of the norm kept on average")
            if mean < WEAK:
                warn(KEEP_THE_LORA)
    save_adapter(result, output, naming=naming.value, dtype=_dtype(dtype))
    for key, why in result.unused.items():
        say.print(f"not used: {printable(key)} ({printable(why)})")


@caches.command()
def info() -> None:
    """Say where the cache is, and what is in it."""
    from .compute.cache import Cache

    cache = Cache()
    found = cache.info()
    table = Table("kind", "entries", "MB", box=None)
    for kind, numbers in found.items():
        table.add_row(kind, str(numbers["entries"]), f"{numbers['bytes'] / 1e6:.1f}")
    used = sum(numbers["bytes"] for numbers in found.values())
    say.print(f"{printable(str(cache.folder))}: {used / 1e9:.2f} of at most {cache.limit / 1e9:.1f} GB")
    say.print("LORAX_CACHE names another folder (or off), LORAX_CACHE_GB another limit")
    if found:
        say.print(table)


@caches.command()
def verify() -> None:
    """Read every entry and remove what is damaged."""
    from .compute.cache import Cache

    found = Cache().verify()
    say.print(f"{found.sound} entries are sound, {len(found.damaged)} were damaged and are removed")
    for path, reason in found.left.items():
        got = f"{len(found.left)}, such as {path}: {reason}"
        raise FileError("entries of the cache cannot be read or removed", got, "change their permissions")


@caches.command()
def clear() -> None:
    """Remove every entry."""
    from .compute.cache import Cache

    say.print(f"{Cache().clear()} files removed")


def _check_outputs(outputs: list[Path | None], *given: "Base | Path") -> None:
    from .adapters.config import read_files
    from .files.output import check_output

    inputs = [file for item in given for file in (read_files(item) if isinstance(item, Path) else item.files)]
    wanted = [path for path in outputs if path]
    for index, path in enumerate(wanted):
        check_output(path, inputs, wanted[:index])


def _engine(device: Device, cache: bool) -> "Engine":
    from .compute.cache import open_cache
    from .compute.engine import Engine

    return Engine(_device(device), open_cache() if cache else None)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures; the caption of x.png is in x.txt.")],
    hpsv2: Annotated[Path | None, typer.Option(help="Folder of HPSv2 as a Hugging Face CLIP model.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="AlexNet's weights, safetensors: diversity by LPIPS.")] = None,
    dinov2: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face DINOv2; needs --reference.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Pictures of the same names to compare with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Score pictures with weights that you have: HPSv2, LPIPS diversity, DINOv2 similarity."""
    from .compute.engine import or_on_cpu
    from .evaluate import evaluate as scored

    scores = or_on_cpu(
        lambda engine: scored(
            folder, hpsv2=hpsv2, lpips=lpips, dinov2=dinov2, reference=reference, device=engine.device
        ),
        _engine(device, cache=False),
    )
    found = asdict(scores)
    if as_json:
        say.print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if value is not None:
            say.print(f"{name.replace('_', ' '):<16} {value:.4g}")


def _device(device: Device) -> str:
    import torch

    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device is Device.cuda and not torch.cuda.is_available():
        raise OptionError("no CUDA device", "--device cuda", "use --device cpu")
    return device.value


def _dtype(dtype: DType) -> "torch.dtype | None":
    import torch

    return None if dtype is DType.keep else getattr(torch, dtype.value)


def main() -> None:
    """Run the command line; see `lorax.entry.run` for its exit status."""
    run(app)
