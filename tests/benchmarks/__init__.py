"""
What things cost, measured side by side in one run: ``python -m tests.benchmarks``.

`measuring` compares, `findings` holds what was found and the bars, `report` writes it down. Each
suite is a module with one function ``run(bench)``; `suites` names them all.
"""
