//! The spawner end to end: real Git, the real sandbox, the durable transport, scripted models.

mod broker;
mod crash;
mod hostile;
mod limits;
mod stage;
mod working;
