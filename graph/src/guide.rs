//! A guide: one page for each concept, with examples that compile and run.
//!
//! In this order: [`state`], [`graphs`], [`subgraphs`], [`waiting`], [`failure`], [`journal`], [`streams`],
//! [`documents`], [`travel`], [`serving`], [`testing`]. Whoever knows
//! LangGraph begins with [`from_langgraph`]. What may be built on, and what not, is in [`guarantees`].

#[doc = include_str!("../docs/guide/documents.md")]
pub mod documents {}

#[doc = include_str!("../docs/guide/failure.md")]
pub mod failure {}

#[doc = include_str!("../docs/guide/from_langgraph.md")]
pub mod from_langgraph {}

#[doc = include_str!("../docs/guide/graphs.md")]
pub mod graphs {}

#[doc = include_str!("../docs/guide/guarantees.md")]
pub mod guarantees {}

#[doc = include_str!("../docs/guide/journal.md")]
pub mod journal {}

#[doc = include_str!("../docs/guide/serving.md")]
pub mod serving {}

#[doc = include_str!("../docs/guide/state.md")]
pub mod state {}

#[doc = include_str!("../docs/guide/streams.md")]
pub mod streams {}

#[doc = include_str!("../docs/guide/subgraphs.md")]
pub mod subgraphs {}

#[doc = include_str!("../docs/guide/testing.md")]
pub mod testing {}

#[doc = include_str!("../docs/guide/travel.md")]
pub mod travel {}

#[doc = include_str!("../docs/guide/waiting.md")]
pub mod waiting {}

// The example there compiles and runs as well.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
