//! From a panel's kind and a number of rows, known at run time, to a kernel compiled for both.

use super::PanelKind;

/// `$tile::<KIND, R>` for a row count R known at run time.
macro_rules! by_rows {
    ($rows:expr, $tile:ident $(, $kind:ident)?) => {
        match $rows {
            1 => $tile::<$($kind,)? 1>,
            2 => $tile::<$($kind,)? 2>,
            3 => $tile::<$($kind,)? 3>,
            4 => $tile::<$($kind,)? 4>,
            5 => $tile::<$($kind,)? 5>,
            6 => $tile::<$($kind,)? 6>,
            7 => $tile::<$($kind,)? 7>,
            8 => $tile::<$($kind,)? 8>,
            12 => $tile::<$($kind,)? 12>,
            other => unreachable!("a tile of {other} rows"),
        }
    };
}
pub(super) use by_rows;

/// `tile_fn` of one instruction set, from its `quantised::<KIND, R>`, `bf16::<R>` and `float::<R>`.
macro_rules! by_kind {
    ($kind:expr, $rows:expr) => {
        match $kind {
            PanelKind::Q4_0 => by_rows!($rows, quantised, Q4_0),
            PanelKind::Q4_1 => by_rows!($rows, quantised, Q4_1),
            PanelKind::Q5_0 => by_rows!($rows, quantised, Q5_0),
            PanelKind::Q5_1 => by_rows!($rows, quantised, Q5_1),
            PanelKind::Q8_0 => by_rows!($rows, quantised, Q8_0),
            PanelKind::Q4K => by_rows!($rows, quantised, Q4K),
            PanelKind::Q5K => by_rows!($rows, quantised, Q5K),
            PanelKind::Q6K => by_rows!($rows, quantised, Q6K),
            PanelKind::Bf16 => by_rows!($rows, bf16),
            PanelKind::F32 => by_rows!($rows, float),
        }
    };
}
pub(super) use by_kind;

/// Kinds as const generics.
pub(super) const Q4_0: u8 = 0;
pub(super) const Q4_1: u8 = 1;
pub(super) const Q5_0: u8 = 2;
pub(super) const Q5_1: u8 = 3;
pub(super) const Q8_0: u8 = 4;
pub(super) const Q4K: u8 = 5;
pub(super) const Q5K: u8 = 6;
pub(super) const Q6K: u8 = 7;

/// What [`Q4_0`] and its like stand for.
pub(super) const fn kind(number: u8) -> PanelKind {
    match number {
        Q4_0 => PanelKind::Q4_0,
        Q4_1 => PanelKind::Q4_1,
        Q5_0 => PanelKind::Q5_0,
        Q5_1 => PanelKind::Q5_1,
        Q8_0 => PanelKind::Q8_0,
        Q4K => PanelKind::Q4K,
        Q5K => PanelKind::Q5K,
        Q6K => PanelKind::Q6K,
        _ => PanelKind::F32,
    }
}
