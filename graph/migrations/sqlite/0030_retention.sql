-- What is forgotten.

-- Checkpoints with a smaller number are forgotten, except those whose fate is to be kept.
alter table graph_thread add column horizon integer;
-- 1: kept, although it is before the horizon. 2: forgotten and cleaned up; of it, and of those before it that it stands for,
-- only the appended items are left.
alter table graph_checkpoint add column fate integer;
-- All of its checkpoints are forgotten. Branch 0 has a row only then.
alter table graph_branch add column gone integer not null default 0;
-- When it arrived.
alter table graph_signal add column at integer not null default 0;
update graph_signal set at = cast((julianday('now') - 2440587.5) * 86400000000 as integer);

-- Threads that were deleted, and whose rows are not all gone yet.
create table graph_garbage (
    thread integer primary key
) strict;
