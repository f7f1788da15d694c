"""``coterie compress``: write a smaller checkpoint."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coterie.cli import options
from coterie.cli.complete import complete_recipe
from coterie.cli.output import print_json, print_text
from coterie.cli.plan import check_request, print_plan
from coterie.model.disk.manifest import RouterForm
from coterie.profile.sources import On


def compress(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the result; must not exist.")],
    keep: options.Keep = None,
    experts: options.Experts = None,
    width: options.Width = None,
    budget: options.Budget = None,
    params: options.Params = None,
    active_params: options.ActiveParams = None,
    budget_for: options.BudgetFor = "file",
    context: options.Context = None,
    batch: options.Batch = None,
    kv_type: options.KvType = None,
    bits: options.Bits = None,
    type: options.Type = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="File of a plan, made by `coterie plan --out`; it says how small, which recipe and router."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How experts are chosen or merged; see `coterie recipes`. Or module:attribute.",
            show_default=options.USUAL_RECIPE,
            autocompletion=complete_recipe,
        ),
    ] = None,
    effort: Annotated[
        Literal["fast", "balanced", "thorough"],
        typer.Option(
            help="How long a recipe that distils trains the result: not at all, on 262,144 or on 1,048,576 tokens."
        ),
    ] = "balanced",
    train_tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on, in place of what --effort says; 0 for none.")
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="For coterie-bits: go on from the types that it chose with an evolutionary search, of so many "
            "generations at most.",
        ),
    ] = None,
    router: Annotated[RouterForm | None, typer.Option(help=options.ROUTER_HELP, show_default="plain")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Folder of a profile; one that holds none yet gets the profile made here.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=f"{options.TEXT_HELP} Needed where there is no profile yet.",
        ),
    ] = None,
    domains: options.Domains = None,
    tokens: options.Tokens = 131_072,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    sample_tokens: options.SampleTokens = 8_192,
    device: options.Device = "cpu",
    inputs: Annotated[
        Literal["original", "compressed"],
        typer.Option(
            help="What a layer is measured on: outputs of the original layers before it, or of compressed ones."
        ),
    ] = "original",
    output_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(help="Number format for weights that are stored quantised (FP8, MXFP4); others keep theirs."),
    ] = "bfloat16",
    on: Annotated[
        On | None,
        typer.Option(
            help="Tokens that count in statistics and losses: all, or answers (messages of the assistant) only; with a "
            "profile that is there, its own.",
            show_default="all",
        ),
    ] = None,
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    mtp: options.Mtp = None,
    multiple_of: options.MultipleOf = None,
    target: options.Target = None,
    experts_only: options.ExpertsOnly = False,
    prices: options.Prices = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Upload the result to this repository on the model hub, like owner/name, when it is whole.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="For --push-to-hub: make it a private repository.")
    ] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Write a smaller checkpoint, one layer in memory at a time.

    It is loaded again and compared with what was computed before it appears at OUT. Ended early, the same command goes
    on from the last finished layer.
    """
    targets: dict[str, Any] = {
        "keep": keep,
        "experts": experts,
        "width": width,
        "budget": budget,
        "params": params,
        "active_params": active_params,
        "bits": bits,
        "type": type,
    }
    how = options.running(budget, budget_for, context, batch, kv_type)
    if plan is None:
        options.one_target(**targets)
        check_request(model, {**targets, "reader": target}, recipe, router or "plain", seed, search or 0)
    from coterie.compress.recipes import get_recipe, training_tokens
    from coterie.compress.target import Target

    if plan is None:
        chosen = get_recipe(Target(**targets, reader=target).recipe_meant(recipe))
        training_tokens(chosen.name, effort, train_tokens, trains=chosen.trains)
    from coterie.profile.shares import parse_domains

    weights = None if domains is None else parse_domains(domains)
    from coterie.compress.apply import compress as run

    settings: dict[str, Any] = {
        **targets,
        "running": how,
        "plan": plan,
        "recipe": recipe,
        "effort": effort,
        "train_tokens": train_tokens,
        "search": search,
        "router": router,
        "profile": profile,
        "text": text,
        "weights": weights,
        "tokens": tokens,
        "seq_len": seq_len,
        "seed": seed,
        "sample_tokens": sample_tokens,
        "device": device,
        "inputs": inputs,
        "output_dtype": output_dtype,
        "max_memory": max_memory,
        "allow_pickle": allow_pickle,
        "mtp": mtp,
        "multiple_of": multiple_of,
        "target": target,
        "experts_only": experts_only,
        "prices": prices,
        "on": on,
    }
    if dry_run:
        from coterie.compress.dry_run import dry_run as foretell

        foretold = foretell(model, out, **settings)
        if json:
            print_json(foretold.content())
            return
        print_plan(foretold.plan)
        for name, reason in foretold.left_out.items():
            print_text(f"{name} would be left out: {reason}")
        for sentence in foretold.outlook.sentences():
            print_text(sentence)
        print_text("dry run: nothing was written")
        return
    result = run(model, out, **settings, push_to_hub=push_to_hub, private=private)
    if json:
        memory = {"forecast_bytes": result.forecast, "peak_bytes": result.peak_bytes}
        url = {} if result.url is None else {"url": result.url}
        print_json({"out": str(result.out), **result.manifest.content(), "seconds": result.seconds, **memory, **url})
        return
    print_plan(result.plan)
    for name, reason in result.manifest.left_out.items():
        print_text(f"{name} was left out: {reason}")
    print_text(f"written to {result.out}; loaded again, its logits differ by {result.logits_error:.1e} of the largest")
    print_text(f"load it with {result.manifest.how_to_load(result.out)}")
    if result.url is not None:
        print_text(f"uploaded to {result.url}")
