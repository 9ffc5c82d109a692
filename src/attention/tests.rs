//! Small tiles and sections, so that small tests cross every edge.
#![forbid(unsafe_code)]
