-- What workers said while they ran: phases, steps, the ends of their output, addresses that were refused. As many as are kept of
-- each, for people to read; nothing depends on it.
CREATE TABLE worker_lines (
    request TEXT   NOT NULL,
    at_ms   BIGINT NOT NULL,                 -- when it was said, by the spawner's clock
    seq     BIGINT NOT NULL,                 -- the spawner's count, which begins again when another one goes on
    kind    TEXT   NOT NULL,
    text    TEXT   NOT NULL,
    PRIMARY KEY (request, at_ms, seq)
);
