"""What came out: the scores of the four artifacts, the merge, the exports."""

from html import escape

from finetune.inference.artifacts import (
    describe_answer_changes,
    describe_rows,
    metric_names,
    table_cells,
    table_headers,
)
from finetune.report.format import (
    ARTIFACTS,
    CHANGES,
    MISSING,
    count,
    is_share,
    metric_title,
    number,
    percent,
    signed,
    size,
)
from finetune.report.intervals import agreement_picture, artifact_picture, change_picture
from finetune.report.markup import Html, figure, joined, mark, section, table, tag
from finetune.report.run_data import Fields
from finetune.report.summary import headline_metric


def scores(report: Fields) -> Html:
    """The four artifacts on the same rows, metric by metric, and where the differences come from."""
    scored = report["eval"]
    if scored is None:
        return Html("")
    measured, changes = scored["artifacts"], scored.get("changes") or {}
    blocks = []
    headline = headline_metric(scored)
    for name in sorted(metric_names(report["artifacts"]), key=lambda name: name != headline):
        share = is_share(
            [item["metrics"][name]["value"] for item in measured.values() if name in (item.get("metrics") or {})]
        )
        unit = ", in points" if share else ""
        blocks.append(figure(artifact_picture(measured, name), "", title=metric_title(name)))
        blocks.append(
            figure(
                change_picture(changes, name, share=share),
                "",
                title=f"{metric_title(name)}: what each step changed{unit}",
            )
        )
    text = (
        f"Each artifact answered the same {count(scored.get('rows'))} held-out rows, which no training step has seen. The dot is the score "
        "and the bar its 95 % interval. The picture beside it shows paired differences: where a bar crosses zero, it may be chance."
    )
    return section(
        "scores",
        "Did it learn the task?",
        tag("p", text),
        tag("div", joined(blocks), kind="pairs"),
        _loss_words(changes),
        _forgotten(changes),
        _tasks(measured),
    )


def artifacts(report: Fields) -> Html:
    """One table of all that was measured on the same rows: every artifact, from the base to each export."""
    lines = report["artifacts"]
    if not lines:
        return Html("")
    names = metric_names(lines)
    kept = frozenset(index for index, line in enumerate(lines) if line["kept"])
    broken = [
        [Html(escape(cell).replace(" [", "<br>[").replace(" from ", "<br>from ")) for cell in table_cells(line, names)]
        for line in lines
    ]
    listed = table(table_headers(lines, metric_title), broken, strong=kept)
    beneath = joined(tag("p", text, kind="caption") for text in describe_answer_changes(lines, metric_title))
    return section("artifacts", "Every artifact on the same rows", tag("p", describe_rows(lines)), listed, beneath)


def _loss_words(changes: Fields) -> Html:
    words = "Perplexity is the number of tokens among which the model hesitates when it reads the right answers; 1 would be certainty."
    found = [f"{CHANGES[name].lower()} {signed(changes[name]['perplexity']['difference'], share=False)}" for name in CHANGES
             if "perplexity" in changes.get(name, {})]  # fmt: skip
    return tag("p", f"{words} Change of it: {', '.join(found)}." if found else words, kind="caption")


def _forgotten(changes: Fields) -> Html:
    """What each step did to the loss on text that has nothing to do with the task."""
    drawn = change_picture(changes, "general_loss", share=False)
    caption = "Change of the loss on general text that no training row resembles, in nats a token. To the right of zero something was lost."
    return figure(drawn, caption, title="What it cost elsewhere")


def _tasks(artifacts: Fields) -> Html:
    """Scores of lm-eval's tasks, with their standard errors."""
    tasks = {name: item["harness"]["tasks"] for name, item in artifacts.items() if item.get("harness")}
    found = {
        (task, metric) for scored in tasks.values() for task, result in scored.items() for metric in result["metrics"]
    }
    rows = []
    for task, metric in sorted(found):
        cells = [(scored[task]["metrics"].get(metric) or {}) if task in scored else {} for scored in tasks.values()]
        shown = [f"{number(cell['value'])} ± {number(cell['stderr'])}" if cell else MISSING for cell in cells]
        rows.append([task, metric, *shown])
    return table(["lm-eval task", "Metric", *[ARTIFACTS[name] for name in tasks]], rows, text_columns=2)


def merged(report: Fields) -> Html:
    """The candidates, measured against the graph that was trained, and which one was written."""
    merge = report["merge"]
    if merge is None:
        return Html("")
    candidates = merge["candidates"] or []
    rows = [_candidate(f"{item['name'].replace('_', ' ')} + adapter", item) for item in candidates]
    kept = [index for index, item in enumerate(candidates) if item["name"] == merge["chosen"]]
    text = (
        "The adapter is added into the weights, so that the result needs no adapter any more. It can be added to the original weights or "
        "to the quantized ones that it was trained on. Each way is measured against the model as trained; KL is how far the two "
        "disagree on the next token."
    )
    reloaded = merge.get("reloaded") or {}
    again = ", ".join(
        f"{shown} {number(reloaded[name])}" for name, shown in (("kl", "KL"), ("loss", "loss")) if name in reloaded
    )
    return section(
        "merge",
        "Merge",
        tag("p", text),
        figure(
            agreement_picture(candidates, merge["chosen"]),
            "KL to the model as trained, on powers of ten; further left is closer.",
        ),
        table(["Weights", "KL", "Same top token", "Size"], rows, strong=frozenset(kept)),
        tag(
            "p",
            f"Kept: {merge['chosen']} + adapter" + (f", by this rule: {merge['rule']}." if merge.get("rule") else "."),
        ),
        tag("p", f"Opened again from disk by a fresh process: {again}.") if again else "",
    )


def _candidate(name: str, item: Fields) -> list[str]:
    return [name, number(item.get("kl")), percent(item.get("top1_agreement")), size(item.get("bytes"))]


def exported(report: Fields) -> Html:
    """Each format that was written, and what its own runtime answered."""
    rows = [
        [item["format"], tag("code", item["path"]), size(item.get("bytes")), *_parity(item.get("parity") or {})]
        for item in report["export"]
    ]
    text = (
        "Each export was opened again by the program that it is meant for and compared with the model it was made from."
    )
    head = [
        "Format",
        "Path",
        "Size",
        "Opened by",
        "Token ids",
        "Logits within",
        "KL",
        "First token",
        "Ends its answer",
    ]
    listed = table(head, rows, text_columns=2)
    return section("exports", "Exports", tag("p", text), listed) if rows else Html("")


def _parity(parity: Fields) -> list[object]:
    """One cell for each thing that was compared; dashes where no runtime opens it."""
    if not parity:
        return [MISSING] * 6
    return [
        parity["runtime"],
        mark(True, f"{parity['chats']} chats the same"),
        f"{number(parity['max_logit_difference'])} (bound {parity['bound']:g})",
        number(parity["kl"]),
        percent(parity["top1_agreement"]),
        "yes" if parity["stops"] else "no, nor does the model",
    ]
