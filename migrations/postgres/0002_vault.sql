-- The vault: values encrypted with age, and which of them a project's service may have.
CREATE TABLE vault_secrets (
    project    TEXT NOT NULL,
    name       TEXT NOT NULL,
    -- An age file. Project and name stand inside it too, so that a row cannot be passed off as another.
    ciphertext BYTEA NOT NULL,
    -- Changes with every new value.
    revision   TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (project, name)
);

CREATE TABLE vault_grants (
    project    TEXT NOT NULL,
    name       TEXT NOT NULL,
    granted_at TEXT NOT NULL,
    PRIMARY KEY (project, name),
    FOREIGN KEY (project, name) REFERENCES vault_secrets (project, name) ON DELETE CASCADE
);
