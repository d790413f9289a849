create table if not exists one_row (
  thread text not null,
  space text not null,
  id uuid not null,
  parent uuid,
  state jsonb not null,
  about jsonb not null,
  primary key (thread, space, id)
);
