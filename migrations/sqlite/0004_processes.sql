-- Work that one process at a time does, where several share a database.
CREATE TABLE leases (
    name     TEXT    NOT NULL PRIMARY KEY,
    holder   TEXT    NOT NULL,               -- the name of the process, which is its alone
    token    TEXT    NOT NULL,
    until_ms INTEGER NOT NULL
) STRICT;

-- Where the worker of each task is, as its spawner says. Not from the journal: nothing depends on it.
CREATE TABLE workers (
    request  TEXT    NOT NULL PRIMARY KEY,
    project  TEXT    NOT NULL,
    job      TEXT    NOT NULL,
    task     TEXT    NOT NULL,
    attempt  INTEGER NOT NULL,
    spawner  TEXT,                           -- null until one took it up
    phase    TEXT    NOT NULL,
    since_ms INTEGER NOT NULL,               -- since when it is in this phase
    until_ms INTEGER NOT NULL,               -- when the crew gives it up
    ended_ms INTEGER
) STRICT;
CREATE INDEX workers_task ON workers (project, job, task);
