"""The table of figures."""

from chaos.figures import PROPERTY, Figures, Row, table


def test_figures_of_several_tests_are_added_up_and_drawn() -> None:
    properties: list[tuple[str, object]] = []
    figures = Figures(properties)
    figures.add(experiment="kills", store="disk", images=40, kills=3, redone=1)
    figures.add(experiment="kills", store="disk", images=40, kills=1, redone=3, lost=1)
    figures.add(experiment="fuzz", store="-", faults=1200)
    assert {name for name, _ in properties} == {PROPERTY}
    rows = [Row(**value) for _, value in properties]  # type: ignore[arg-type]
    assert table(rows) == [
        "| experiment | store | images | kills survived | faults injected | lost | doubled |   redone |",
        "| ---------- | ----- | -----: | -------------: | --------------: | ---: | ------: | -------: |",
        "| kills      | disk  |     80 |              4 |               0 |    1 |       0 | 4 (5.0%) |",
        "| fuzz       | -     |      0 |              0 |           1,200 |    0 |       0 |        0 |",
    ]
