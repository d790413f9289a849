-- Which data folder this database belongs to: repositories and releases are there, and threads speak of them.
CREATE TABLE installation (
    one  bigint NOT NULL PRIMARY KEY CHECK (one = 1),
    home text   NOT NULL
);
