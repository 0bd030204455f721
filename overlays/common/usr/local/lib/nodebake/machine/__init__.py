"""The program `nodebake`. It only looks: nothing on the machine is changed, and whatever a machine may look like (files
missing or damaged, systemd absent, half installed) is told, never a traceback.

    main.py        arguments
    status.py      what is asked of the machine; certificates.py, endpoints.py, units.py, firstboot.py its parts
    report.py      the same as lines for people
    diagnose.py    the archive for support; scrub.py leaves secrets out of it
    system.py      files and programs of the machine, or of a folder that holds one
"""
