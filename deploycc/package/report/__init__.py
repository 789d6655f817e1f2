"""The report: one HTML file that works offline, made from the manifest, or from bench results, alone.

subject     what the page is about, and its candidates in one form
timing      what is read of a bench result: the only module that knows its fields
plots/      the figures: one file = one kind
drawing     matplotlib's SVG, coloured by CSS variables
tables, advice, units    everything that is text
page        puts them together
"""

from __future__ import annotations

from deploycc.package.report.page import fragment, page, plots, render, subjects_of
from deploycc.package.report.subject import of_bench, of_manifest, of_profile, of_race

__all__ = ["fragment", "of_bench", "of_manifest", "of_profile", "of_race", "page", "plots", "render", "subjects_of"]
