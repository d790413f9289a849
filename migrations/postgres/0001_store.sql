-- The product's own tables. Times are milliseconds since 1970 (UTC) in columns named *_ms; JSON is text.

-- Projections of the journal: everything down to `outbox_intents` can be dropped and rebuilt from it.

CREATE TABLE projection_cursors (
    name   TEXT    NOT NULL PRIMARY KEY,
    cursor BIGINT  NOT NULL,       -- the last entry of the journal that was applied
    target BIGINT  NOT NULL              -- where a rebuild has to come before anything is sent again
);

CREATE TABLE projects (
    id           TEXT    NOT NULL PRIMARY KEY,
    slug         TEXT    NOT NULL UNIQUE,
    name         TEXT    NOT NULL,
    goal         TEXT    NOT NULL,
    owner        TEXT,
    approved     BOOLEAN NOT NULL,       -- whether it has a specification
    hold         TEXT    NOT NULL,       -- '' | 'stopped' | 'removed' | 'archived'
    status       TEXT    NOT NULL,
    url          TEXT,
    repository   TEXT,
    port         BIGINT,
    limit_usd    DOUBLE PRECISION,
    limit_tokens BIGINT,
    founded_ms   BIGINT  NOT NULL,
    changed_ms   BIGINT  NOT NULL
);

CREATE TABLE jobs (
    project    TEXT    NOT NULL,
    id         TEXT    NOT NULL,
    seq        BIGINT  NOT NULL,       -- the entry that began it
    kind       TEXT    NOT NULL,
    title      TEXT    NOT NULL,
    thread     TEXT    NOT NULL,
    phase      TEXT    NOT NULL,       -- what its own events say; the status also knows of waits
    status     TEXT    NOT NULL,
    ended_by   TEXT,       -- 'crew' | 'engine'
    node       TEXT,
    overview   TEXT,
    url        TEXT,
    failure    TEXT,
    started_ms BIGINT  NOT NULL,
    ended_ms   BIGINT,
    PRIMARY KEY (project, id)
);

CREATE TABLE tasks (
    project       TEXT    NOT NULL,
    job           TEXT    NOT NULL,
    id            TEXT    NOT NULL,
    position      BIGINT  NOT NULL,
    title         TEXT    NOT NULL,
    depends_on    TEXT    NOT NULL,
    thread        TEXT    NOT NULL,
    phase         TEXT    NOT NULL,
    status        TEXT    NOT NULL,
    ended_by      TEXT,
    approved      BOOLEAN NOT NULL,
    attempts      BIGINT  NOT NULL,
    review_rounds BIGINT  NOT NULL,
    request       TEXT,
    summary       TEXT,
    failure       TEXT,
    merged_sha    TEXT,
    started_ms    BIGINT,
    ended_ms      BIGINT,
    PRIMARY KEY (project, job, id)
);

CREATE TABLE pull_requests (
    project    TEXT    NOT NULL,
    number     BIGINT  NOT NULL,
    job        TEXT    NOT NULL,
    task       TEXT    NOT NULL,
    status     TEXT    NOT NULL,
    url        TEXT    NOT NULL,
    head       TEXT    NOT NULL,
    merged_sha TEXT,
    opened_ms  BIGINT  NOT NULL,
    changed_ms BIGINT  NOT NULL,
    PRIMARY KEY (project, number)
);
CREATE INDEX pull_requests_task ON pull_requests (project, job, task);

CREATE TABLE deployments (
    project     TEXT    NOT NULL,
    release     BIGINT  NOT NULL,
    job         TEXT,
    sha         TEXT    NOT NULL,
    status      TEXT    NOT NULL,
    url         TEXT    NOT NULL,
    checks      TEXT    NOT NULL,
    deployed_ms BIGINT  NOT NULL,
    changed_ms  BIGINT  NOT NULL,
    PRIMARY KEY (project, release)
);

CREATE TABLE waits (
    id          TEXT    NOT NULL PRIMARY KEY,
    project     TEXT    NOT NULL,
    job         TEXT,
    task        TEXT,
    kind        TEXT    NOT NULL,
    question    TEXT    NOT NULL,
    options     TEXT    NOT NULL,
    free_text   BOOLEAN NOT NULL,
    audience    TEXT    NOT NULL,
    thread      TEXT    NOT NULL,
    interrupt   TEXT    NOT NULL,
    status      TEXT    NOT NULL,       -- 'open' | 'closed'
    answer      TEXT,
    answered_by TEXT,
    seq         BIGINT  NOT NULL,
    opened_ms   BIGINT  NOT NULL,
    closed_ms   BIGINT
);
CREATE INDEX waits_open ON waits (project, status);

CREATE TABLE ledger (
    id            TEXT    NOT NULL PRIMARY KEY,
    project       TEXT    NOT NULL,
    job           TEXT,
    task          TEXT,
    role          TEXT    NOT NULL,
    model         TEXT    NOT NULL,
    input_tokens  BIGINT  NOT NULL,
    output_tokens BIGINT  NOT NULL,
    cost_usd      DOUBLE PRECISION,       -- null where no price is known
    spent_ms      BIGINT  NOT NULL
);
CREATE INDEX ledger_project ON ledger (project, job, task);

CREATE TABLE messages (
    seq         BIGINT  NOT NULL PRIMARY KEY,
    project     TEXT    NOT NULL,
    kind        TEXT    NOT NULL,
    author      TEXT,       -- null: the crew
    message_key TEXT    NOT NULL,
    body        TEXT    NOT NULL,
    said_ms     BIGINT  NOT NULL
);
CREATE INDEX messages_project ON messages (project, seq);

CREATE TABLE outbox_intents (
    id          TEXT    NOT NULL PRIMARY KEY,
    seq         BIGINT  NOT NULL,       -- the entry that made it
    revision    BIGINT  NOT NULL,       -- the entry that changed it last
    project     TEXT    NOT NULL,
    job         TEXT,
    audience    TEXT    NOT NULL,
    kind        TEXT    NOT NULL,
    body        TEXT    NOT NULL,
    wait        TEXT,
    severity    TEXT,
    fingerprint TEXT,
    times       BIGINT  NOT NULL,
    closed      BOOLEAN NOT NULL,
    first_ms    BIGINT  NOT NULL,
    last_ms     BIGINT  NOT NULL
);
CREATE INDEX outbox_intents_revision ON outbox_intents (audience, revision);
CREATE INDEX outbox_intents_fingerprint ON outbox_intents (fingerprint, severity, seq);

-- Not projections: what became of the intents, and what people and other systems told us.

CREATE TABLE chats (
    front       TEXT    NOT NULL,
    chat        TEXT    NOT NULL,
    person      TEXT,
    project     TEXT,       -- what is talked about at the moment
    admin       BOOLEAN NOT NULL,
    admin_since BIGINT  NOT NULL,       -- entries after this one are for it
    PRIMARY KEY (front, chat)
);

CREATE TABLE chat_projects (
    front   TEXT    NOT NULL,
    chat    TEXT    NOT NULL,
    project TEXT    NOT NULL,
    since   BIGINT  NOT NULL,
    PRIMARY KEY (front, chat, project),
    FOREIGN KEY (front, chat) REFERENCES chats (front, chat) ON DELETE CASCADE
);

CREATE TABLE deliveries (
    intent      TEXT    NOT NULL,
    front       TEXT    NOT NULL,
    chat        TEXT    NOT NULL,
    revision    BIGINT  NOT NULL,       -- the newest one that was sent or given up; 0 before
    message_id  TEXT,
    status      TEXT    NOT NULL,       -- 'sending' | 'sent' | 'retry' | 'failed'
    attempts    BIGINT  NOT NULL,
    next_try_ms BIGINT,
    lease_ms    BIGINT,
    last_error  TEXT,
    sent_ms     BIGINT,
    PRIMARY KEY (intent, front, chat)
);
CREATE INDEX deliveries_chat ON deliveries (front, chat, next_try_ms, lease_ms);

CREATE TABLE people (
    id        TEXT    NOT NULL PRIMARY KEY,
    name      TEXT    NOT NULL,
    standing  TEXT    NOT NULL,       -- 'stranger' | 'allowed' | 'admin' | 'blocked'
    seen_ms   BIGINT  NOT NULL,
    paired_ms BIGINT
);

CREATE TABLE pairing_codes (
    hash       TEXT    NOT NULL PRIMARY KEY,
    created_ms BIGINT  NOT NULL,
    expires_ms BIGINT  NOT NULL,
    attempts   BIGINT  NOT NULL,
    used_by    TEXT,
    used_ms    BIGINT
);

CREATE TABLE inbox (
    front       TEXT    NOT NULL,
    update_id   BIGINT  NOT NULL,
    raw         TEXT    NOT NULL,
    status      TEXT    NOT NULL,       -- 'new' | 'handled' | 'dead'
    attempts    BIGINT  NOT NULL,
    error       TEXT,
    received_ms BIGINT  NOT NULL,
    handled_ms  BIGINT,
    PRIMARY KEY (front, update_id)
);
CREATE INDEX inbox_new ON inbox (front, status, update_id);

CREATE TABLE buttons (
    token      TEXT    NOT NULL PRIMARY KEY,
    wait       TEXT    NOT NULL,
    choice     TEXT    NOT NULL,
    audience   TEXT    NOT NULL,
    owner      TEXT,       -- the one person who may press it; null: everybody who is allowed
    revision   BIGINT  NOT NULL,       -- the revision of the question that was shown
    expires_ms BIGINT  NOT NULL,
    used_ms    BIGINT,
    used_by    TEXT,
    used_key   TEXT,       -- the press that used it, so that the same press again is no second one
    chosen     TEXT    -- what was chosen, on every button of the wait
);
CREATE INDEX buttons_wait ON buttons (wait);

CREATE TABLE allocations (
    kind         TEXT    NOT NULL,
    value        TEXT    NOT NULL,
    project      TEXT    NOT NULL,
    allocated_ms BIGINT  NOT NULL,
    PRIMARY KEY (kind, value),
    UNIQUE (kind, project)
);

CREATE TABLE errands (
    id          TEXT    NOT NULL PRIMARY KEY,
    reply_to    TEXT    NOT NULL,
    work        TEXT    NOT NULL,
    status      TEXT    NOT NULL,       -- 'queued' | 'running' | 'done' | 'cancelled'
    attempts    BIGINT  NOT NULL,
    lease_ms    BIGINT,
    lease_token TEXT,
    outcome     TEXT,
    delivered   BOOLEAN NOT NULL,
    handed_ms   BIGINT  NOT NULL,
    ended_ms    BIGINT
);
CREATE INDEX errands_status ON errands (status, handed_ms);
CREATE INDEX errands_undelivered ON errands (delivered, status);
