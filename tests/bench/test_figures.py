from flux_batch.bench.figures import Figures, alternated, number, ratio, table


def test_runs_take_turns_after_uncounted_warm_ups() -> None:
    calls: list[tuple[str, int]] = []
    times = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0, 30.0, 35.0])

    seconds = alternated(
        {"a": lambda repeat: calls.append(("a", repeat)), "b": lambda repeat: calls.append(("b", repeat))},
        2,
        warm_ups=2,
        clock=lambda: next(times),
    )

    assert calls == [("a", -2), ("a", -1), ("b", -2), ("b", -1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert seconds == {"a": Figures((1.0, 2.0)), "b": Figures((3.0, 5.0))}


def test_a_ratio_above_1_means_ours_is_faster() -> None:
    assert ratio(Figures((1.0, 2.0, 4.0)), Figures((3.0, 3.0, 3.0))) == {"median": 1.5, "least": 0.75, "most": 3.0}


def test_figures_keep_every_value() -> None:
    figures = Figures((4.0, 1.0, 3.0)).scaled(0.5)

    assert figures.to_json() == {"median": 1.5, "least": 0.5, "most": 2.0, "values": [2.0, 0.5, 1.5]}
    assert str(figures) == "1.5 (0.5 to 2)"


def test_numbers_have_four_digits_and_no_exponent() -> None:
    assert [number(value) for value in (0.0, 0.00001234, 0.0123456, 1.5, 98765.4)] == [
        "0", "0.000012", "0.01235", "1.5", "98765",
    ]  # fmt: skip


def test_columns_of_a_table_are_aligned() -> None:
    assert table([["stage", "s"], ["T5", "12.5"]]) == "stage     s\nT5     12.5"
