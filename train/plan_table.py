"""A plan as tables for people.

In: a plan. Out: text on the terminal.
"""

from rich.console import Console
from rich.table import Table

from train.flops import PARTS, forward_flops, parameters, training_flops
from train.memory import MOMENTS
from train.plan import GIB, Plan

WIDTH = 120  # of lines in a pipe
HEADS = {"passes": "in the passes", "reduction": "at their end", "step": "optimizer step"}
PLACES = {"device": "GPU", "host": "host", "disk": "disk"}


def show(plan: Plan, scaled: list[Plan]) -> None:
    """Print all of it, and the same run on other numbers of nodes."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    pieces = _head(plan), _model(plan), _memory(plan), _traffic(plan), _time(plan), _scaling(scaled), summary(plan)
    for piece in pieces:
        console.print(piece)


def summary(plan: Plan) -> str:
    """One line: size, memory and pace, as the headers of train/configs have it."""
    counted, kept = parameters(plan.job.config), plan.passes.kept / GIB
    size = f"P_core {sum(counted.values()) / 1e6:,.1f} M (trunk {counted['trunk'] / 1e6:,.1f} M)"
    line = f"{size}, P_unit {plan.job.config.unit_embed_size} a source; a rank needs {plan.device_gib:.1f} GiB"
    if not plan.job.on_cuda:
        return line
    low_s, high_s = plan.pace.bounds_s
    steps = f"{1 / high_s:,.1f} to {1 / low_s:,.1f} steps/s at {plan.machine.mfu:.0%} of the peak"
    return f"{line} of {plan.machine.memory_gib:.0f}, {kept:.1f} of them kept activations; {steps}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _head(plan: Plan) -> str:
    job, train = plan.job, plan.job.run.train
    where = "GPUs" if job.on_cuda else "CPU ranks"
    return (
        f"{job.run.model.preset} on {job.nodes} x {job.slots} {where}, {job.run.ds_config}, {train.precision}; "
        f"a step: {train.global_batch_size:,} windows = {job.num_ranks} ranks x {job.accumulation} x "
        f"{train.micro_batch_size}"
    )


def _model(plan: Plan) -> Table:
    config, shape = plan.job.config, max(plan.samples, key=lambda shape: shape.tokens)
    table = _table("\nThe model, and a window of the fullest turn", "", "parameters", "forward GFLOP", "training GFLOP")
    columns = parameters(config), forward_flops(config, shape), training_flops(config, shape)
    for part in (*PARTS, "all"):
        counts, forward, training = (sum(column.values()) if part == "all" else column[part] for column in columns)
        table.add_row(part, f"{counts:,}", f"{forward / 1e9:,.1f}", f"{training / 1e9:,.1f}")
    rows = plan.job.num_rows
    table.add_row(
        "unit table", f"{rows * config.unit_embed_size:,}", "", f"({rows:,} rows of {config.unit_embed_size})"
    )
    return table


def _memory(plan: Plan) -> Table:
    table = _table("\nMemory of a rank, GiB", "", "", *HEADS.values())
    for part in sorted(plan.parts, key=lambda part: list(PLACES).index(part.place)):
        sizes = [getattr(part, moment) / GIB for moment in MOMENTS]
        place = PLACES[part.place] if plan.job.on_cuda else ""
        table.add_row(part.name, place, *(f"{size:,.3f}" if size else "" for size in sizes))
    machine = plan.machine
    device = "GPU" if plan.job.on_cuda else "rank"
    table.add_row("assumed: context, communication", device, *[f"{machine.reserved_gib:,.3f}"] * len(HEADS))
    table.add_row(f"a {device} at the worst moment, with {machine.slack:.0%} of slack", "", f"{plan.device_gib:,.3f}")
    table.add_row("a node's host", "", f"{plan.host_gib:,.3f}")
    if plan.disk_gib:
        table.add_row("a node's disks", "", f"{plan.disk_gib:,.3f}")
    return table


def _traffic(plan: Plan) -> Table:
    job = plan.job
    heads = ["payload", "times", "in its node", "out of it", "a node", "rounds", "latency, s", "s"]
    table = _table("\nSent in a step, GB of a GPU", "", *heads)
    for exchange in plan.exchanges:
        intra, inter = exchange.sent(job.nodes, job.slots) if exchange.group not in ("host", "disk") else (0.0, 0.0)
        numbers = [exchange.payload / 1e9, exchange.times, intra / 1e9, inter / 1e9, inter * job.slots / 1e9]
        numbers += [exchange.rounds, exchange.waiting(job, plan.machine), exchange.seconds(job, plan.machine)]
        table.add_row(exchange.name, *(f"{n:,.3g}" for n in numbers))
    return table


def scale_of(plan: Plan) -> dict[str, float]:
    """A number of nodes, what a rank has to do there, and how long it takes."""
    low_s, high_s = plan.pace.bounds_s
    return {
        "nodes": plan.job.nodes,
        "ranks": plan.job.num_ranks,
        "micro_batches": plan.job.accumulation,
        "device_gib": plan.device_gib,
        "compute_s": plan.pace.compute_s,
        "exchange_s": plan.pace.exchange_s,
        "latency_s": sum(exchange.waiting(plan.job, plan.machine) for exchange in plan.exchanges),
        "low_s": low_s,
        "high_s": high_s,
        "tokens_per_s": plan.tokens / high_s,
    }


def _scaling(plans: list[Plan]) -> Table:
    """Efficiency is of the slower bound: tokens of a rank and second, over those on the fewest nodes."""
    heads = ["ranks", "micro-batches", "GiB", "operations, s", "exchanges, s", "latency, s", "a step, s", "tokens/s"]
    table = _table("\nThe same run on other numbers of nodes", "nodes", *heads, "efficiency")
    scales = [scale_of(plan) for plan in plans]
    for scale in scales:
        times = [f"{scale[name]:.3g}" for name in ("compute_s", "exchange_s", "latency_s")]
        step = "{low_s:.3g} to {high_s:.3g}".format(**scale)
        each = [row["tokens_per_s"] / row["ranks"] for row in (scale, scales[0])]
        sizes = [f"{scale['ranks']}", f"{scale['micro_batches']}", f"{scale['device_gib']:.1f}"]
        pace = f"{scale['tokens_per_s']:,.0f}", f"{each[0] / each[1]:.0%}"
        table.add_row(f"{scale['nodes']}", *sizes, *times, step, *pace)
    return table


def _time(plan: Plan) -> str:
    job, machine, pace = plan.job, plan.machine, plan.pace
    low_s, high_s = pace.bounds_s
    steps = job.run.train.num_steps
    unit_hours = f", {plan.recordings.unit_hours:,.1f} unit-hours" if plan.recordings.unit_hours else ""
    rate = f"{plan.tokens / high_s:,.0f} to {plan.tokens / low_s:,.0f}"
    lines = [
        f"\nA step: {pace.compute_s:.3g} s of operations, {pace.exchange_s:.3g} s of exchanges, {pace.offload_s:.3g} s "
        f"of offloading; {low_s:.3g} s where exchanges hide behind operations, {high_s:.3g} s where none does",
        f"{rate} tokens/s; data, validation and checkpoints are not in it",
        f"{steps:,} steps: {_days(plan.days(steps))}",
        f"One pass through {plan.recordings.name} ({plan.recordings.num_windows:,} windows{unit_hours}): "
        f"{plan.steps_of_a_pass:,.1f} steps, {_days(plan.days(plan.steps_of_a_pass))}",
        f"Assumed: {machine.peak_tflops:g} TFLOP/s x {machine.mfu:.0%}, {machine.bandwidth_intra:g} GB/s in a node, "
        f"{machine.bandwidth_inter:g} GB/s out of it for each GPU; {machine.latency_intra:g} and "
        f"{machine.latency_inter:g} us a message; eager operations (compiled ones hold less)",
    ]
    return "\n".join(lines)


def _days(days: tuple[float, float]) -> str:
    return "{:.3g} to {:.3g} days".format(*days)
