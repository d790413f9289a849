//! The crew on the real engine, with small in-memory doubles of its ports.

mod conversation;
mod crash;
mod forge;
mod job;
mod stage;
mod task;
mod world;
