//! The bot against a Bot API server over HTTP, on a real store, with a front desk that writes down what it is asked for.

#[path = "../support/mod.rs"]
mod support;

mod answers;
mod commands;
mod delivery;
mod durability;
mod people;
mod secrets;
mod servers;
