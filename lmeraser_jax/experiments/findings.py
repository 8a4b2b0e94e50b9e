"""What each figure shows, in sentences computed from the rows; plain text, not yet escaped for a page.

Orderings of the paper are judged as `uncertainty` says.
"""

from collections.abc import Iterable, Mapping

from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.experiments.summary import (
    ACCURACY,
    CLUSTERS,
    COST,
    IMAGES,
    PARAMETERS,
    PASSES,
    RECORDS,
    SECONDS,
    SPENT,
    Quantity,
    Rows,
    Spread,
    Titles,
    amount,
    by_method,
    by_seed,
    main,
    of,
    on_several,
    pareto,
    spreads,
    titled,
    unique,
)
from lmeraser_jax.experiments.uncertainty import NOT_MEASURED, Claim, verdict

CHEAP = 3.0  # percent of a full tuning
OURS = "lmeraser"


def ordering(claim: Claim, rows: Rows, titles: Titles) -> str:
    """A claim with its verdict on every data set."""
    words = "is more accurate than" if claim.sign == ">" else "is as accurate as"
    head = f"Paper: {titled(claim.first, titles)} {words} {titled(claim.second, titles)}. Here: "
    parts = [
        f"{titled(dataset, titles)}: {verdict(claim, by_seed(here, ACCURACY, by_method))}"
        for dataset, here in _by(rows, "dataset")
    ]
    return head + ("; ".join(parts) or NOT_MEASURED) + "."


def accuracy(rows: Rows, titles: Titles) -> list[str]:
    """The best method of every data set, the place of LMEraser, and the paper's ordering (Fig. 3)."""
    chosen, sentences = main(rows), []
    for dataset, here in _by(chosen, "dataset"):
        found = _known(here, ACCURACY)
        ranks = sorted(found, key=lambda name: -found[name].mean)
        if len(ranks) > 1:
            best = f"{titled(ranks[0], titles)} is the most accurate of {len(ranks)} methods ({_of(found[ranks[0]])})"
            if OURS in ranks[1:]:
                best += f", {titled(OURS, titles)} comes at place {ranks.index(OURS) + 1} ({_of(found[OURS])})"
            known = [100 * row.majority for row in here if row.majority > 0]
            best += f"; always the largest class has {max(known):.1f} %" if known else ""
            sentences.append(f"{titled(dataset, titles)}: {best}.")
    claims = Claim("single", "~", OURS), Claim(OURS, ">", "dam-vp")
    return [*sentences, *(ordering(claim, chosen, titles) for claim in claims)]


def backbones(rows: Rows, titles: Titles) -> list[str]:
    """The paper's ordering of backbones (Fig. 4): more classes of pretraining, more accuracy."""
    several, sentences = on_several(rows), []
    names = unique(row.backbone for row in several)
    for large, small in [(name, name.replace("22k", "1k")) for name in names if "22k" in name]:
        for method, here in _by([row for row in several if row.backbone in (large, small)], "method"):
            parts = [
                f"{titled(dataset, titles)}: {verdict(Claim(large, '>', small), by_seed(there, ACCURACY, _backbone))}"
                for dataset, there in _by(here, "dataset")
            ]
            claim = f"Paper: {titled(large, titles)} is more accurate than {titled(small, titles)}"
            sentences.append(f"{claim}. Here, with {titled(method, titles)}: {'; '.join(parts)}.")
    return sentences or [f"Paper: backbones of ImageNet-22K are more accurate than those of 1K. Here: {NOT_MEASURED}."]


def _backbone(row: Measurement) -> str:
    return row.backbone


def epochs(rows: Rows, titles: Titles) -> list[str]:
    """Where every curve ends, the best first (Fig. 5)."""
    sentences = []
    for dataset, here in _by(of(rows, "epochs"), "dataset"):
        curves = sorted(_curves(here, titles), key=lambda curve: -curve[1][max(curve[1])].mean)
        ends = [f"{name} {_of(found[max(found)])} after {max(found):g} epochs" for name, found in curves]
        sentences.append(f"{titled(dataset, titles)}: {'; '.join(ends)}.")
    return sentences


def removal(rows: Rows, titles: Titles) -> list[str]:
    """What erasing costs in accuracy (Fig. 6, left)."""
    sentences = []
    for dataset, here in _by(of(rows, "removal"), "dataset"):
        parts = []
        for name, found in _curves(here, titles):
            (low, first), (high, last) = min(found.items()), max(found.items())
            if low < high and first.mean > 0:
                loss = f"a relative loss of {100 * (1 - last.mean / first.mean):.1f} %"
                parts.append(f"{name} from {first.mean:.1f} to {last.mean:.1f} % at {100 * high:.3g} %, {loss}")
        sentences.append(
            f"{titled(dataset, titles)}, accuracy as records are erased: {'; '.join(parts) or NOT_MEASURED}."
        )
    return sentences


def cut(rows: Rows, titles: Titles) -> list[str]:
    """Accuracy with the fewest and the most clusters (Fig. 6, right)."""
    sentences = []
    for dataset, here in _by(of(rows, "cut"), "dataset"):
        clusters = dict(_curves(here, titles, CLUSTERS))
        for name, line in _lines(here, titles):
            found = by_seed(line, ACCURACY, lambda row: row.x)
            count = {x: clusters[name][x].mean for x in found if x in clusters.get(name, {})}
            few, many = min(count, key=lambda x: count[x]), max(count, key=lambda x: count[x])
            says = verdict(Claim("few", ">", "many"), {"few": found[few], "many": found[many]} if few != many else {})
            sizes = f"{count[few]:.0f} (cut {few:g}) against {count[many]:.0f} (cut {many:g})"
            claim = "Paper: fewer clusters are more accurate"
            sentences.append(f"{claim}. Here, {titled(dataset, titles)}, {name}, {sizes}: {says}.")
    return sentences


def affected(rows: Rows, titles: Titles) -> list[str]:
    """Records and parameters of LMEraser's requests, and how many times as many elsewhere (Fig. 7)."""
    others = ("retrain", "sisa-vote")
    return [
        *_savings(rows, titles, {RECORDS: "records", PARAMETERS: "parameters"}, "affects", others),
        *_on_features_of_all(rows, titles),
    ]


def _on_features_of_all(rows: Rows, titles: Titles) -> list[str]:
    """Who affects all records and is cheap all the same."""
    here = [row for row in main(rows) if row.records_request > 0.99 * (row.records - 1)]
    cheap = [titled(name, titles) for name, found in _known(here, COST).items() if found.mean < 99]
    what = "All records count where a head on features of all is made again, which passes no image: "
    return [what + ", ".join(cheap) + "."] if cheap else []


def effort(rows: Rows, titles: Titles) -> list[str]:
    """Time and images of LMEraser's requests, and how many times as many elsewhere (Table 3)."""
    return _savings(rows, titles, {SECONDS: "seconds", IMAGES: "images"}, "takes", ("single", "dam-vp"))


def _savings(
    rows: Rows, titles: Titles, quantities: Mapping[Quantity, str], verb: str, others: tuple[str, ...]
) -> list[str]:
    sentences = []
    for dataset, here in _by(main(rows), "dataset"):
        found = {unit: _known(here, quantity) for quantity, unit in quantities.items()}
        ours = {unit: methods[OURS].mean for unit, methods in found.items() if OURS in methods}
        parts = [
            f"a request to {titled(OURS, titles)} {verb} {_and(amount(x) + ' ' + unit for unit, x in ours.items())}"
        ]
        for other in others:
            times = [
                f"{amount(found[unit][other].mean / value)} times the {unit}"
                for unit, value in ours.items()
                if other in found[unit] and value > 0
            ]
            parts.append(f"{titled(other, titles)} {_and(times)}")
        sentences.append(f"{titled(dataset, titles)}: {'; '.join(parts) if ours else NOT_MEASURED}.")
    return sentences


def _and(parts: Iterable[str]) -> str:
    return " and ".join(parts) or NOT_MEASURED


def partitions(rows: Rows, titles: Titles) -> list[str]:
    return [ordering(Claim(OURS, ">", "rndpart"), main(rows), titles)]


def heads(rows: Rows, titles: Titles) -> list[str]:
    return [ordering(Claim("one-head", "~", OURS), main(rows), titles)]


def tradeoff(rows: Rows, titles: Titles) -> list[str]:
    """The most accurate method that is cheap, and who is on the front."""
    sentences = []
    for dataset, here in _by(main(rows), "dataset"):
        costs, scores = _known(here, COST), _known(here, ACCURACY)
        names = [name for name in costs if name in scores]
        cheap = [name for name in names if costs[name].mean <= CHEAP]
        if cheap:
            best = max(cheap, key=lambda name: scores[name].mean)
            price = f"a request passes {amount(costs[best].mean)} % of the images of a full tuning"
            text = f"{titled(best, titles)} is the most accurate ({_of(scores[best])}; {price})"
        else:
            text = "no method was measured" if not names else "there is no method"
        line = f" The best trade-offs, cheapest first: {', '.join(_front(here, COST, titles))}." if names else ""
        passes = _front(here, PASSES, titles)
        line += f" By passes per prediction: {', '.join(passes)}." if passes else ""
        sentences.append(f"{titled(dataset, titles)}: at a cost of at most {CHEAP:g} %, {text}.{line}")
    return sentences


def _front(rows: Rows, quantity: Quantity, titles: Titles) -> list[str]:
    """The methods on the front of accuracy against a cost, the cheapest first."""
    costs, scores = _known(rows, quantity), _known(rows, ACCURACY)
    names = [name for name in costs if name in scores]
    front = pareto([(costs[name].mean, scores[name].mean) for name in names])
    return [titled(names[i], titles) for i in front]


def sequences(rows: Rows, titles: Titles) -> list[str]:
    """What every kind of sequence has cost at its end, and what became of the accuracy."""
    sentences = []
    for dataset, there in _by(of(rows, "sequence"), "dataset"):
        for series, here in _by(there, "series"):
            spent, scores = dict(_curves(here, titles, SPENT)), dict(_curves(here, titles))
            total = {name: found[max(found)].mean for name, found in spent.items()}
            change = [found[max(found)].mean - found[min(found)].mean for found in scores.values()]
            head = ", ".join(titled(part, titles) for part in (dataset, series) if part)
            ends = ", ".join(f"{name} {amount(total[name])}" for name in sorted(total, key=lambda name: total[name]))
            end = f"after {max(row.x for row in here):g} requests, images passed: {ends or NOT_MEASURED}"
            ends_at = " to ".join(dict.fromkeys(f"{one(change):+.1f}" for one in (min, max))) if change else ""
            moved = f"accuracy changed by {ends_at} points" if change else NOT_MEASURED
            sentences.append(f"{head}: {end}; {moved}.")
    return sentences


def _by(rows: Rows, field: str) -> list[tuple[str, list[Measurement]]]:
    """Rows parted by data set or method, in the order of first appearance."""
    names = unique(getattr(row, field) for row in rows)
    return [(name, [row for row in rows if getattr(row, field) == name]) for name in names]


def _known(rows: Rows, quantity: Quantity) -> dict[str, Spread]:
    """Of every method that has it."""
    return {name: found for name, found in spreads(rows, quantity, by_method).items() if found.known}


def _lines(rows: Rows, titles: Titles) -> list[tuple[str, list[Measurement]]]:
    """Rows of every method and backbone of one data set; named by the backbone, too, where several are."""
    backbones, series = (len({getattr(row, field) for row in rows}) > 1 for field in ("backbone", "series"))
    lines = []
    for line in unique((row.method, row.backbone, row.series) for row in rows):
        parts = (line[0], line[1] if backbones else "", line[2] if series else "")
        here = [row for row in rows if (row.method, row.backbone, row.series) == line]
        lines.append((" · ".join(titled(part, titles) for part in parts if part), here))
    return lines


def _curves(rows: Rows, titles: Titles, quantity: Quantity = ACCURACY) -> list[tuple[str, dict[float, Spread]]]:
    """The known points of `_lines`, where there are any."""
    curves = [(name, spreads(here, quantity, lambda row: row.x)) for name, here in _lines(rows, titles)]
    known = [(name, {x: found for x, found in curve.items() if found.known}) for name, curve in curves]
    return [(name, curve) for name, curve in known if curve]


def _of(found: Spread) -> str:
    return f"{found.mean:.1f} ± {found.sd:.1f} %" if found.seeds > 1 else f"{found.mean:.1f} %"
