"""One self-contained HTML page: a table, training curves, and where teacher and students look.

render_report(path, title, rows, curves, scenes, facts, note="This is a miniature ...")
"""

from compodistill.tools.report.page import Scene, render_report

__all__ = ["Scene", "render_report"]
