"""Runs whose configuration, figures and log are kept: the ground of every comparison of methods.

    configuration  what decides a run, and its name, the hash of that
    single         one run, from a configuration to a record
    store          a folder with one file a record, and files of many records
    pool           many runs, each in a process of its own
    contestants    what is compared, and at which learning rates
    limits         what a run may take, asked before it is started
    reference      the reference runs of a task: rates chosen on the validation split, then several seeds
    summary        records as rows of a table

A run that fails is a record too, with the reason.
"""
