//! Sizes as people write them.

use std::{fmt, str::FromStr};

/// A number of bytes; reads `1GiB`, `512 MiB`, `1.5GB` and plain numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ByteSize(pub u64);

/// Why a size could not be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ByteSizeError {
    /// Not a number with a known unit.
    #[error("{0:?} is not a size: write a number and B, KiB, MiB, GiB, TiB (or KB, MB, GB, TB), as in 512MiB")]
    Syntax(String),
    /// Over 2^64 − 1 bytes.
    #[error("{0:?} is too large")]
    TooLarge(String),
}

const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

fn unit_bytes(unit: &str) -> Option<u64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    })
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || ByteSizeError::Syntax(text.to_owned());
        let trimmed = text.trim();
        let split = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit_bytes(unit.trim()).ok_or_else(syntax)?;
        if let Ok(whole) = number.parse::<u64>() {
            return whole
                .checked_mul(unit)
                .map(Self)
                .ok_or_else(|| ByteSizeError::TooLarge(text.to_owned()));
        }
        let bytes = number.parse::<f64>().map_err(|_| syntax())? * unit as f64;
        if bytes >= u64::MAX as f64 {
            return Err(ByteSizeError::TooLarge(text.to_owned()));
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in UNITS {
            if self.0 >= bytes {
                return if self.0.is_multiple_of(bytes) {
                    write!(f, "{} {name}", self.0 / bytes)
                } else {
                    write!(f, "{:.1} {name}", self.0 as f64 / bytes as f64)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<u64, ByteSizeError>) {
        assert_eq!(text.parse::<ByteSize>().map(|size| size.0), expected, "{text}");
    }

    #[test]
    fn reads_sizes() {
        check("1GiB", Ok(1 << 30));
        check(" 512 MiB ", Ok(512 << 20));
        check("1.5KiB", Ok(1_536));
        check("2GB", Ok(2_000_000_000));
        check("64m", Ok(64 << 20));
        check("1048576", Ok(1_048_576));
        check("0", Ok(0));
        for bad in ["", "GiB", "-1GiB", "1XiB", "1.2.3", "ten"] {
            check(bad, Err(ByteSizeError::Syntax(bad.into())));
        }
        check("18446744073709551615", Ok(u64::MAX));
        for large in ["18446744073709551616TiB", "99999999TiB"] {
            check(large, Err(ByteSizeError::TooLarge(large.into())));
        }
    }

    #[test]
    fn what_it_prints_it_reads() {
        for (bytes, text) in [
            (0, "0 B"),
            (1_023, "1023 B"),
            (1 << 30, "1 GiB"),
            (1_536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
            check(text, Ok(bytes));
        }
    }
}
