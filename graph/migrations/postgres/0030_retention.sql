-- What is forgotten.

-- Checkpoints with a smaller number are forgotten, except those whose fate is to be kept.
alter table graph_thread add column horizon integer;
-- 1: kept, although it is before the horizon. 2: forgotten and cleaned up; of it, and of those before it that it stands for,
-- only the appended items are left.
alter table graph_checkpoint add column fate smallint;
-- All of its checkpoints are forgotten. Branch 0 has a row only then.
alter table graph_branch add column gone boolean not null default false;
-- When it arrived.
alter table graph_signal add column at timestamptz not null default now();

-- Threads that were deleted, and whose rows are not all gone yet.
create table graph_garbage (
    thread bigint primary key
);
