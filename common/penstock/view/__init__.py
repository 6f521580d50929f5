"""The page of a run: what its folder holds, as people look at it in a browser (docs/view.md).

From the folder up, and each layer imports only lower ones:

    app                                               FastAPI: parses an address, calls, answers
    runs  page_files  guard                           the runs that one page shows, its files, who may read
    run                                               one run: its indexes, and one question each
    step_search                                       all completions
    groups  timeline  search  dropped  dead_letters   answers, made of recorded groups and lines
    log_ratios                                        beside step files
    steps  tickets  step_files  pieces  advantages    indexes and readers
    lines  curves                                     files of lines; fewer points of a curve

Invariant: nothing is written, no request leaves the host, and what is held in memory does not grow with the size of
step files or samples: only with the number of steps and tickets, a few bytes each.
"""
