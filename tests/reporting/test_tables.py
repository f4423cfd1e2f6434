"""Markdown tables."""

from glass_mlx.reporting.tables import markdown_table


def test_columns_are_padded_and_aligned():
    table = markdown_table(["method", "KL"], [["a", "0.5"], ["longest", "12"]], left=("method",))
    assert table.splitlines() == [
        "| method  |   KL |",
        "| :------ | ---: |",
        "| a       |  0.5 |",
        "| longest |   12 |",
    ]


def test_padding_can_be_turned_off():
    table = markdown_table(["method", "KL"], [["longest", "12"]], left=("method",), padded=False)
    assert table.splitlines() == ["| method | KL |", "| :--- | ---: |", "| longest | 12 |"]
