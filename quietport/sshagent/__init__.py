"""Agent access: ssh-agent sessions that a person can inspect, that expire and that fail closed.

    root.py      the directories and files of a user's sessions, all relative to directory descriptors
    record.py    session.json, agent.env and what is believed of them
    process.py   which process a PID means; what the kernel is asked to keep from others
    audit.py     audit.jsonl and the journal
    sessions.py  status of every session, and the end of one written down once
    wanted.py    what a caller asks for, and the programs it takes
    key.py       the private key on its way from the caller to ssh-add
    hosts.py     destination constraints; hostkeys.py looks for their keys
    watch.py     the process that ends the agent, whatever becomes of the wrapper
    job.py       the command, its signals and its terminal
    wrapper.py   a session from its start to its end
    listing.py, prune.py, stop.py, evidence.py   the commands that need no key

Every module that a session needs is imported before it begins: Python reads a zipapp when it imports, and an
upgrade may have replaced the file by the time a session ends.
"""
