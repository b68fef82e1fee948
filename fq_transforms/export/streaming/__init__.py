"""A folder to another, piece by piece.

    sources                 a folder to read: its plain weights by name, whatever it stores them in
    job                     a conversion, decided: its pieces, and how one is read, quantized and written
    stage                   the directory in which the folder is made, and which pieces are on the disk
    run                     pieces to ranks and threads, within memory; then the folder appears
    ahead                   bytes that will be needed are read before
    ranks                   processes that share the work
    conversion              what became of the folder, as a table

A step of one piece goes to `job`, one of the whole to `run`.
"""
