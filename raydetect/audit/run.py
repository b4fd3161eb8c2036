"""Runs an audit from listing to summary. A second run writes the same bytes again."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raydetect.archives.open import open_archive
from raydetect.audit.measures import MEASURES, measures
from raydetect.audit.nights import Claim, Nights, unclaimed
from raydetect.audit.report_section import extra_of
from raydetect.audit.rules import Rule, evaluate_rule, parse_rules
from raydetect.audit.statistics import Statistics
from raydetect.audit.webhook import Webhook
from raydetect.config import AuditSpec, night_score, sink_storage, source_storage
from raydetect.config.validation import to_plain
from raydetect.errors import StorageError
from raydetect.planning.plan import ScorePlan, plan_score
from raydetect.report.build import page_of
from raydetect.report.pictures import Reach
from raydetect.report.tally import Tally, measure_of, tally
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage, normalise_uri

HISTORY = 30
Score = Callable[[ScorePlan], object]


@dataclass(frozen=True, slots=True)
class Audit:
    """A checked audit job; nothing is listed or written yet."""

    spec: AuditSpec
    nights: Nights
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, spec: AuditSpec) -> "Audit":
        """Creates an audit from a job.

        Raises:
            SpecError: a rule or a URI is invalid.
        """
        nights = Nights(normalise_uri(spec.sink.uri), Storage(sink_storage(spec)))
        return cls(spec, nights, parse_rules(spec.alarm_when, MEASURES))

    def pending(self, note: Callable[[str], object] = lambda _: None) -> list[Claim]:
        """Returns the nights to audit, in order: unfinished ones, then the requested one.

        Lists the archive and claims the shards that no night has claimed. An existing night keeps its shards; without a
        name and without new shards, the requested night is the last one again.

        Args:
            note: called with each note on the archive to show to the user.

        Raises:
            SpecError, StorageError: the archive cannot be listed.
        """
        claims = self.nights.claims()
        done = set(self.nights.numbers("summaries"))
        if self.spec.night is not None and all(claim.number in done for claim in claims):
            known = [claim for claim in claims if claim.night == self.spec.night]
            if known:
                return known
        archive = open_archive(self.spec.source, Storage(source_storage(self.spec, self.spec.source)))
        listing = archive.listing()
        for sentence in listing.notes:
            note(sentence)
        shards = list(listing.shards)
        claims = [claim if claim.number in done else self.nights.without_changed(claim, shards) for claim in claims]
        unfinished = [claim for claim in claims if claim.number not in done]
        for claim in claims:
            if claim.night == self.spec.night:
                return [other for other in unfinished if other.number < claim.number] + [claim]
        new = unclaimed(shards, claims, self.spec.source)
        if new:  # the new night reports the files that the listing left out
            new[0] = replace(new[0], left_out=shards[0].left_out)
        if not new and self.spec.night is None and claims:
            return unfinished or [claims[-1]]
        number = claims[-1].number + 1 if claims else 1
        return [*unfinished, self.nights.claim(self.spec.night or f"night-{number:05d}", new, number)]

    def run(self, claim: Claim, score: Score) -> dict[str, Any]:
        """Scores the remaining shards of a night, judges it, and returns its summary.

        Args:
            claim: the night.
            score: runs a plan.

        Raises:
            RaydetectError: the scoring failed; committed shards are kept.
        """
        old = self.nights.read("summaries", claim.number)
        if old is not None and old["judged_by"] == self._judgement_key():
            return old
        results = self.nights.results_uri(claim.number)
        if old is None:
            plan = plan_score(night_score(self.spec, results), claim.shards)
            plan.begin()
            score(plan)
        ledger = Ledger(results, self.nights.storage)
        run = ledger.require_run()
        night = Statistics(measure_of(run))
        row_tally = tally(ledger, run, self.spec.pictures, night.add)
        names, baseline = self._baseline(claim, str(run["result"]["artifact"]), night.measure)
        summary = self._summary(claim, run, row_tally, night, (names, baseline))
        history = [*self._history(claim.number), summary]
        reach = Reach(Storage(source_storage(self.spec, self.spec.source)), Storage(self.spec.storage))
        page = page_of(ledger, run, row_tally, extra_of(summary, night, baseline, history), reach)
        self.nights.write("statistics", claim.number, night.plain())
        self.nights.storage.write(self.nights.report_uri(claim.number), page.encode())
        self.nights.write("summaries", claim.number, summary)
        stored = self.nights.read("summaries", claim.number)
        assert stored is not None
        return stored

    def notify(self, claim: Claim, summary: Mapping[str, Any], webhook: Webhook | None) -> bool:
        """Sends the summary to the webhook, once for each night; returns whether it was sent now.

        Raises:
            WebhookError: the webhook did not accept it.
        """
        if webhook is None or (webhook.spec.when == "alarm" and not summary["alarm"]):
            return False
        body = json.dumps(summary, sort_keys=True, allow_nan=False).encode()
        if self.nights.read("webhooks", claim.number) is not None:
            return False
        status = webhook.send(claim.night, body)
        self.nights.write("webhooks", claim.number, {"status": status, "place": webhook.place})
        return True

    def _judgement_key(self) -> dict[str, Any]:
        return {"alarm_when": list(self.spec.alarm_when), "baseline": to_plain(self.spec.baseline)}

    def _summary(
        self,
        claim: Claim,
        run: Mapping[str, Any],
        row_tally: Tally,
        night: Statistics,
        compared: tuple[list[str], Statistics | None],
    ) -> dict[str, Any]:
        names, baseline = compared
        values = measures(night, baseline)
        verdicts = [evaluate_rule(rule, values) for rule in self.rules]
        alarms = [verdict.rule.name for verdict in verdicts if verdict.outcome == "alarm"]
        return {
            "night": claim.night,
            "number": claim.number,
            "alarm": bool(alarms),
            "alarms": alarms,
            "images": night.images,
            "flagged": night.flagged,
            "bad": night.bad,
            "statuses": dict(sorted(row_tally.totals.statuses.items())),
            "shards": len(claim.shards),
            "artifact": str(run["result"]["artifact"]),
            "archive": str(run["result"]["archive"]),
            "measures": values,
            "baseline": {"nights": names, "images": 0 if baseline is None else baseline.images},
            "rules": [
                {
                    "name": verdict.rule.name,
                    "rule": verdict.rule.text,
                    "outcome": verdict.outcome,
                    "values": dict(verdict.values),
                }
                for verdict in verdicts
            ],
            "judged_by": self._judgement_key(),
            "results": self.nights.results_uri(claim.number),
            "report": self.nights.report_uri(claim.number),
        }

    def _baseline(self, claim: Claim, artifact: str, measure: str) -> tuple[list[str], Statistics | None]:
        """Names of the baseline nights, latest first, and their merged statistics."""
        together, names = Statistics(measure), list[str]()
        for summary in self._earlier(claim.number):
            skipped = summary["alarm"] and self.spec.baseline.alarmed == "skip"
            if skipped or summary["artifact"] != artifact or not summary["images"]:
                continue
            together.merge(self._statistics(int(summary["number"])))
            names.append(str(summary["night"]))
            if len(names) == self.spec.baseline.nights:
                break
        return names, together if names else None

    def _earlier(self, number: int) -> Iterator[dict[str, Any]]:
        """Yields the summaries of earlier nights, latest first."""
        for earlier in reversed(self.nights.numbers("summaries")):
            if earlier < number:
                summary = self.nights.read("summaries", earlier)
                if summary is not None:
                    yield summary

    def _history(self, number: int) -> list[dict[str, Any]]:
        earlier = [summary for summary, _ in zip(self._earlier(number), range(HISTORY - 1), strict=False)]
        return earlier[::-1]

    def _statistics(self, number: int) -> Statistics:
        try:
            return Statistics.of_plain(self.nights.read("statistics", number) or {})
        except (ValueError, KeyError, TypeError) as error:
            uri = self.nights.record_uri("statistics", number)
            raise StorageError(
                f"{uri}: is damaged ({type(error).__name__}). Remove it and summaries/{number:05d}.json, and audit "
                "that night again by its name."
            ) from None
