//! One file per command.

pub(crate) mod chat;
pub(crate) mod generate;
pub(crate) mod model;
pub(crate) mod node;
pub(crate) mod router;
pub(crate) mod up;
