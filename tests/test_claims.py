"""The verdicts on the papers' claims, on planted runs whose differences are known."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from pages import ROOT

from reidnb.evaluation.statistics import holm
from reidnb.results.claims import (
    DOES_NOT,
    HOLDS,
    OPEN,
    Claim,
    claim_recipes,
    claims_csv,
    claims_markdown,
    decisive_sentences,
    judge_claims,
    pairs_of,
    person_differences,
    plot_claims,
    read_claims,
    what_it_takes,
    write_claims,
)
from reidnb.results.gallery import save_paper_figure

SET = "synthped-small"
PIDS = np.repeat(np.arange(40), 2)  # two queries a person
RNG = np.random.default_rng(0)
EASE = RNG.uniform(0.3, 0.7, 40)  # of each person, the same for every network


def claim(name, **changed):
    "A claim about Top-DB-Net's drop stream."
    given = dict(claim="a claim", where="§1", table="topdb-table1", why="It is planted.")
    given |= dict(above="Top-DB-Net", below="no-drop Top-DB-Net")
    return Claim(id=f"topdb-{name}", **given | changed)


def plant(store, c, gains, profile="study", pids=PIDS, scatter=0.02, looking=None):
    "Write a pair of runs a seed, of which the first is better by `gains`, one for each seed."
    for seed, gain in enumerate(gains):
        for i, r in enumerate(claim_recipes(c, SET, profile)):
            rng = np.random.default_rng([seed, i])
            ap = EASE[pids] + gain * (i == 0) + rng.normal(0, scatter, len(pids))
            run = store / r.directory.replace("-s0", f"-s{seed}")
            run.mkdir(parents=True, exist_ok=True)
            info = dict(recipe=r.json() | {"seed": seed}, seed=seed, status="finished")
            info |= dict(metrics={"mAP": float(ap.mean())}, tested={"gallery": 100})
            (run / "run.json").write_text(json.dumps(info))
            columns = dict(
                pid=pids, ap=ap, ap50=ap, inp=ap / 2, first_match=np.where(ap > 0.5, 1, 3)
            )
            pd.DataFrame(columns).to_csv(run / "queries.csv", index=False)
            if looking:
                pd.DataFrame({"pid": pids, looking: ap}).to_csv(run / "looking.csv", index=False)


def judged(store, *claims):
    "The verdicts, a row a claim."
    return judge_claims(store, SET, list(claims), samples=2000)


def test_planted_differences_give_known_verdicts(tmp_path):
    better = claim("better")
    worse = claim("worse", below="no-reg Top-DB-Net")
    equal = claim("equal", above="no-drop Top-DB-Net", below="Baseline")
    plant(tmp_path, better, [0.1, 0.11, 0.09])
    t = judged(tmp_path, better)
    assert (t.verdict[0], t.seeds[0], t.people[0]) == (HOLDS, 3, 40)
    assert t.difference[0] == pytest.approx(0.1, abs=0.01)
    assert t.low[0] < 0.1 < t.high[0]

    plant(tmp_path / "worse", worse, [-0.1, -0.08, -0.09])
    assert judged(tmp_path / "worse", worse).verdict[0] == DOES_NOT

    plant(tmp_path / "equal", equal, [0.0, 0.0, 0.0])
    t = judged(tmp_path / "equal", equal)
    assert t.verdict[0] == OPEN and t.reason[0] in ("not sure", "seeds disagree")

    far = claim("far")  # the bootstrap is sure, three seeds are not
    plant(tmp_path / "far", far, [0.03, 0.03, 0.2])
    t = judged(tmp_path / "far", far)
    assert (t.verdict[0], t.reason[0]) == (OPEN, "seeds vary")
    assert t.p_holm[0] < 0.05 < t.p_seeds[0] and t.low[0] < 0, "the interval is that of t"


def test_seeds_that_disagree_and_a_single_seed_are_open(tmp_path):
    c = claim("one")
    plant(tmp_path / "one", c, [0.3])
    t = judged(tmp_path / "one", c)
    assert (t.verdict[0], t.reason[0]) == (OPEN, "one seed")
    assert t.p[0] < 0.01, "however sure of these two trainings"
    assert "need 2 more seeds" in what_it_takes(next(t.itertuples()))
    assert np.isnan(t.p_holm[0]) and np.isnan(t.p_seeds[0])
    plant(tmp_path / "apart", c, [0.3, 0.3, -0.01])
    t = judged(tmp_path / "apart", c)
    assert (t.verdict[0], t.reason[0]) == (OPEN, "seeds disagree")


def test_the_seeds_are_fixed(tmp_path):
    "No verdict before the third seed, and later ones play no part: nobody stops at a good moment."
    c = claim("fixed")
    plant(tmp_path, c, [0.3, 0.31])
    t = judged(tmp_path, c)
    assert (t.verdict[0], t.reason[0], t.seeds[0]) == (OPEN, "few seeds", 2)
    assert np.isfinite(t.p_seeds[0]) and np.isnan(t.p_holm[0])
    plant(tmp_path, c, [0.3, 0.31, 0.3, -0.5, -0.5])
    t = judged(tmp_path, c)
    assert (t.verdict[0], list(t.pairs[0])) == (HOLDS, [0, 1, 2])
    above, below = claim_recipes(c, SET, "study")
    (tmp_path / below.directory.replace("-s0", "-s1") / "run.json").unlink()  # of one row
    assert list(judged(tmp_path, c).pairs[0]) == [0, 2]


def test_a_short_profile_gives_no_verdict(tmp_path):
    c = claim("short")
    plant(tmp_path, c, [0.1, 0.11, 0.09], "laptop")
    t = judged(tmp_path, c)
    assert (t.verdict[0], t.reason[0], t.seeds[0]) == (OPEN, "short training", 3)
    assert "need 3 seeds in the profile study" in what_it_takes(next(t.itertuples()))


def test_twice_the_length_stands_beside_the_claim(tmp_path):
    c = claim("longer")
    plant(tmp_path, c, [0.1, 0.11, 0.09])
    for r, ap in zip(claim_recipes(c, SET, "study", epochs=120), (0.54, 0.5)):
        run = tmp_path / r.directory
        run.mkdir(parents=True)
        info = dict(recipe=r.json(), seed=0, status="finished", metrics={"mAP": ap})
        info["tested"] = {"gallery": 100}
        (run / "run.json").write_text(json.dumps(info))
        columns = dict(pid=PIDS, ap=ap, ap50=ap, inp=ap, first_match=1)
        pd.DataFrame(columns).to_csv(run / "queries.csv", index=False)
    t = judged(tmp_path, c)
    assert (t.profile[0], t.seeds[0], t.verdict[0]) == ("study", 3, HOLDS)
    assert (
        "In the profile study with 120 epochs the difference is +4.0 (1 seed)."
        in claims_markdown(t)
    )


def test_the_correction_covers_the_page(tmp_path):
    "By hand: of four claims, the smallest p is taken four times, the next three times."
    rows = ("no-drop Top-DB-Net", "no-reg Top-DB-Net", "Baseline")
    claims = [claim(f"c{i}", below=label) for i, label in enumerate(rows)]
    claims.append(claim("not-there", table="topdb-table1", above="Baseline", below=rows[1]))
    for c, gain in zip(claims, (0.1, 0.006, 0.002)):
        plant(tmp_path, c, [gain] * 3)
    for i in range(2):  # the row above is planted by each, so it is the last one's
        plant(tmp_path, claims[i], [(0.1, 0.006)[i]] * 3)
    above, below = claim_recipes(claims[2], SET, "study")
    (tmp_path / below.directory.replace("-s0", "-s2") / "run.json").unlink()
    t = judged(tmp_path, *claims)
    assert list(t.seeds) == [3, 3, 2, 2]
    assert t.p_holm.isna().tolist() == [False, False, True, True]
    ps = sorted(t.p[:2])
    by_hand = [4 * ps[0], max(4 * ps[0], 3 * ps[1])]
    assert sorted(t.p_holm[:2]) == pytest.approx([min(1, p) for p in by_hand])
    assert np.allclose(holm([0.01, 0.02, 0.5]), [0.03, 0.04, 0.5])
    alone = judged(tmp_path, claims[1])
    assert alone.p_holm[0] == alone.p[0]


def test_a_missing_row_is_open_with_what_it_takes(tmp_path):
    c = claim("missing")
    plant(tmp_path, c, [0.1, 0.1])
    above, below = claim_recipes(c, SET, "study")
    for run in (tmp_path / SET / below.method).iterdir():
        (run / "queries.csv").unlink()
    t = judged(tmp_path, c)
    assert (t.verdict[0], t.reason[0], t.seeds[0]) == (OPEN, "no pair", 0)
    said = what_it_takes(next(t.itertuples()))
    assert "`topdb` and `topdb/no-drop`" in said
    assert "`reidnb table topdb-table1 --datasets synthped-small --profile study" in said


def test_profiles_are_never_mixed(tmp_path):
    "A run of each in two profiles is no pair; of two pairs the longer profile's is taken."
    c = claim("lengths")
    plant(tmp_path, c, [0.1, 0.1], "study")
    plant(tmp_path, c, [-0.1], "laptop")
    t = judged(tmp_path, c)
    assert (t.profile[0], t.seeds[0]) == ("study", 2)
    difference, seeds = t.elsewhere[0]["laptop"]
    assert difference == pytest.approx(-0.1, abs=0.02) and seeds == 1

    study = pairs_of(c, SET, "study", tmp_path)[0]
    laptop = pairs_of(c, SET, "laptop", tmp_path)[0]
    with pytest.raises(ValueError, match="are no pair: profile is study and laptop"):
        person_differences([(study[0], laptop[1])])
    with pytest.raises(ValueError, match="are no pair: seed is 0 and 1"):
        person_differences([(study[0], pairs_of(c, SET, "study", tmp_path)[1][1])])

    for run in (tmp_path / SET / "topdb/no-drop").iterdir():
        if json.loads((run / "run.json").read_text())["recipe"]["profile"] == "study":
            (run / "run.json").unlink()
    assert judged(tmp_path, c).profile[0] == "laptop"


def test_other_queries_are_refused(tmp_path):
    c = claim("people")
    plant(tmp_path, c, [0.1])
    plant(tmp_path / "other", c, [0.1], pids=PIDS[::-1])
    one = pairs_of(c, SET, "study", tmp_path)[0]
    other = pairs_of(c, SET, "study", tmp_path / "other")[0]
    with pytest.raises(ValueError, match="was tested on other queries"):
        person_differences([(one[0], other[1])])


def test_another_test_is_refused(tmp_path):
    "The queries are the same, and the gallery is another."
    c = claim("gallery")
    plant(tmp_path, c, [0.1])
    one = pairs_of(c, SET, "study", tmp_path)[0]
    info = json.loads((one[1] / "run.json").read_text())
    (one[1] / "run.json").write_text(json.dumps(info | {"tested": {"gallery": 99}}))
    with pytest.raises(ValueError, match="are no pair: tested is"):
        person_differences([one])


def test_people_without_a_value_in_one_run_are_left_out(tmp_path):
    "The means of both rows are of the same people, so they differ by the difference."
    c = claim("people", metric="spread of trunk", below="Baseline")
    plant(tmp_path, c, [0.1, 0.1], looking="spread of trunk")
    above, below = pairs_of(c, SET, "study", tmp_path)[1]
    t = pd.read_csv(above / "looking.csv")
    t.loc[t.pid < 5, "spread of trunk"] = np.nan
    t.to_csv(above / "looking.csv", index=False)
    D, means = person_differences(list(pairs_of(c, SET, "study", tmp_path).values()), c.metric)
    assert D.shape == (2, 35)
    assert np.allclose(means[:, 0] - means[:, 1], D.mean(1))


def test_the_unit_is_the_person(tmp_path):
    "Every query twice tells nothing new: the interval and p stay as they are."
    c = claim("unit")
    plant(tmp_path / "once", c, [0.01], scatter=0.1)
    once = judged(tmp_path / "once", c)
    for file in (tmp_path / "once").rglob("queries.csv"):
        t = pd.read_csv(file)
        pd.concat([t, t]).to_csv(file, index=False)
    twice = judged(tmp_path / "once", c)
    for name in ("difference", "low", "high", "p"):
        assert twice[name][0] == pytest.approx(once[name][0], abs=1e-9)
    assert twice.people[0] == 40

    for file in (tmp_path / "once").rglob("queries.csv"):  # one person's queries ten times
        t = pd.read_csv(file)
        pd.concat([t, *[t[t.pid == 3]] * 9]).to_csv(file, index=False)
    many = judged(tmp_path / "once", c)
    assert many.difference[0] == pytest.approx(once.difference[0], abs=1e-9)


def test_a_claim_about_maps_reads_each_query(tmp_path):
    c = claim("maps", metric="spread of trunk", below="Baseline")
    plant(tmp_path, c, [0.1, 0.1])
    assert judged(tmp_path, c).reason[0] == "no pair"  # no maps were measured
    plant(tmp_path, c, [0.1, 0.1, 0.1], looking="spread of trunk")
    t = judged(tmp_path, c)
    assert t.verdict[0] == HOLDS
    assert len(plot_claims(t).axes) == 1


def test_a_second_page_is_the_same_bytes(tmp_path):
    c = read_claims()[0]
    plant(tmp_path / "runs", c, [0.1, 0.12, 0.11], scatter=0.1)
    for name in ("one", "two"):
        t = write_claims(tmp_path / "runs", tmp_path / name, SET)
        save_paper_figure(plot_claims(t), "a caption", "figure", tmp_path / name)
    for file in ("claims.md", "claims.csv", "figure.png", "figure.svg"):
        first, second = (tmp_path / name / file for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes(), file
    text = (tmp_path / "one/claims.md").read_text()
    assert f"{len(t)} claims: **holds** 1, **does not** 0, **open** {len(t) - 1}" in text
    assert decisive_sentences(t)[0].startswith(f"BDB, “{c.claim}”: **holds**.")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(above="Top-DB-Nett"), "unknown row of topdb-table1"),
        (dict(metric="map"), "the metric of topdb-x is 'map'"),
        (dict(why=""), "topdb-x lacks the key why"),
        (dict(wy="?"), "unknown key of topdb-x"),
        (dict(id="abc-x"), "unknown paper of abc-x"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, changes, said):
    given = {k: v for k, v in vars(claim("x")).items() if v is not None}
    file = tmp_path / "claims.yaml"
    file.write_text(json.dumps([given | changes]))
    with pytest.raises(ValueError, match=re.escape(said)):
        read_claims(file)


def test_the_published_page_is_that_of_the_published_runs():
    "What `make publish` wrote, computed again."
    published = ROOT / "reports/published"
    t = judge_claims()
    assert (published / "claims.md").read_text() == claims_markdown(t)
    written = pd.read_csv(published / "claims.csv", keep_default_na=False)
    assert list(written.id) == [c.id for c in read_claims()]
    assert list(written.verdict) == list(claims_csv(t).verdict)
    assert (t.seeds >= 3)[t.verdict != OPEN].all()
