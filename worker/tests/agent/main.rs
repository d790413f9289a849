//! The agent and the command adapter against a scripted endpoint and a broker, over HTTP, with real
//! Git and a real shell.

mod adapters;
mod command;
mod endpoint;
mod working;
