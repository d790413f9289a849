-- Which data folder this database belongs to: repositories and releases are there, and threads speak of them.
CREATE TABLE installation (
    one  INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    home TEXT    NOT NULL
) STRICT;
