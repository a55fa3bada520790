//! From bytes to metadata and tensor entries.

use std::collections::{HashMap, HashSet};

use crate::{
    GgufError,
    limits::{
        MAX_ALIGNMENT, MAX_ARRAY_LEN, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_METADATA_ENTRIES, MAX_NAME_BYTES,
        MAX_STRING_BYTES, MAX_TENSORS,
    },
    tensor::{TensorEntry, TensorType},
    value::{Array, Value},
};

const DEFAULT_ALIGNMENT: u32 = 32;

pub(crate) struct Parsed {
    pub(crate) version: u32,
    pub(crate) metadata: HashMap<String, Value>,
    pub(crate) tensors: Vec<TensorEntry>,
}

pub(crate) fn parse(file: &[u8]) -> Result<Parsed, GgufError> {
    let mut reader = Reader {
        bytes: &file[..file.len().min(MAX_HEADER_BYTES)],
        at: 0,
    };
    if reader.take::<4>("the magic")? != *b"GGUF" {
        return Err(GgufError::Magic);
    }
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version(version));
    }
    let tensor_count = bounded("the tensor count", reader.u64("the tensor count")?, MAX_TENSORS)?;
    let entry_count = bounded(
        "the metadata count",
        reader.u64("the metadata count")?,
        MAX_METADATA_ENTRIES,
    )?;

    // Maps and lists grow with what is really there, not with what the counts say.
    let mut metadata = HashMap::new();
    for _ in 0..entry_count {
        let key = reader.string("a metadata key", MAX_NAME_BYTES)?;
        let value_type = reader.u32("a metadata type")?;
        let value = reader.value(&key, value_type)?;
        if metadata.contains_key(&key) {
            return Err(GgufError::Duplicate {
                what: "metadata key",
                name: key,
            });
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(&metadata)?;

    let mut names = HashSet::new();
    let mut described = Vec::new();
    for _ in 0..tensor_count {
        let tensor = reader.tensor()?;
        if !names.insert(tensor.name.clone()) {
            return Err(GgufError::Duplicate {
                what: "tensor",
                name: tensor.name,
            });
        }
        described.push(tensor);
    }
    let data_start = reader.at.next_multiple_of(alignment);
    let tensors = described
        .into_iter()
        .map(|tensor| tensor.place(data_start, alignment, file.len()))
        .collect::<Result<Vec<_>, _>>()?;
    check_disjoint(&tensors, data_start)?;
    Ok(Parsed {
        version,
        metadata,
        tensors,
    })
}

fn bounded(what: &'static str, value: u64, limit: u64) -> Result<u64, GgufError> {
    if value > limit {
        Err(GgufError::TooLarge { what, value, limit })
    } else {
        Ok(value)
    }
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<usize, GgufError> {
    const KEY: &str = "general.alignment";
    let alignment = match metadata.get(KEY) {
        None => u64::from(DEFAULT_ALIGNMENT),
        Some(value) => value.as_u64().ok_or_else(|| GgufError::WrongType {
            key: KEY.into(),
            expected: "an unsigned integer",
            found: value.describe(),
        })?,
    };
    if !alignment.is_power_of_two() || alignment > u64::from(MAX_ALIGNMENT) {
        return Err(GgufError::Alignment(alignment));
    }
    Ok(alignment as usize)
}

/// No two tensors share a byte.
fn check_disjoint(tensors: &[TensorEntry], data_start: usize) -> Result<(), GgufError> {
    let mut by_start: Vec<&TensorEntry> = tensors.iter().collect();
    by_start.sort_by_key(|tensor| (tensor.start, tensor.len));
    for pair in by_start.windows(2) {
        if pair[0].start + pair[0].len > pair[1].start {
            return Err(GgufError::Placement {
                name: pair[1].name.clone(),
                offset: (pair[1].start - data_start) as u64,
                reason: "it overlaps another tensor",
            });
        }
    }
    Ok(())
}

/// A tensor as the file describes it, before its place is checked.
struct Described {
    name: String,
    dimensions: Vec<u64>,
    dtype: TensorType,
    offset: u64,
}

impl Described {
    fn place(self, data_start: usize, alignment: usize, file_len: usize) -> Result<TensorEntry, GgufError> {
        let Described {
            name,
            dimensions,
            dtype,
            offset,
        } = self;
        let (rows, columns, len) = match shape(&dimensions, dtype) {
            Ok(shape) => shape,
            Err(reason) => return Err(GgufError::Shape { name, reason }),
        };
        let placed = |reason| {
            Err(GgufError::Placement {
                name: name.clone(),
                offset,
                reason,
            })
        };
        if !offset.is_multiple_of(alignment as u64) {
            return placed("it is not aligned");
        }
        let start = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_add(data_start));
        match start.and_then(|start| start.checked_add(len).map(|end| (start, end))) {
            Some((start, end)) if end <= file_len => Ok(TensorEntry {
                name,
                rows,
                columns,
                dtype,
                start,
                len,
            }),
            _ => placed("it ends beyond the file, which is truncated"),
        }
    }
}

/// (rows, columns, bytes)
fn shape(dimensions: &[u64], dtype: TensorType) -> Result<(usize, usize, usize), &'static str> {
    let [columns, outer @ ..] = dimensions else {
        return Err("it has no dimension");
    };
    if dimensions.contains(&0) {
        return Err("a dimension is zero");
    }
    let columns = usize::try_from(*columns).map_err(|_| "a dimension overflows")?;
    let rows = outer
        .iter()
        .try_fold(1usize, |rows, &dimension| {
            rows.checked_mul(usize::try_from(dimension).ok()?)
        })
        .ok_or("its row count overflows")?;
    rows.checked_mul(columns).ok_or("its size overflows")?;
    let Some((numbers, _)) = dtype.block() else {
        return Ok((rows, columns, 0));
    };
    if !columns.is_multiple_of(numbers) {
        return Err("its rows are not whole blocks of its type");
    }
    let len = dtype
        .row_bytes(columns)
        .and_then(|bytes| bytes.checked_mul(rows))
        .ok_or("its size overflows")?;
    Ok((rows, columns, len))
}

/// Reads the header from its start; every read is checked against the bytes that are there.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn slice(&mut self, len: usize, what: &'static str) -> Result<&[u8], GgufError> {
        if len > self.remaining() {
            return Err(GgufError::Truncated { what, at: self.at });
        }
        let slice = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(slice)
    }

    fn take<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.slice(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.take(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.take(what)?))
    }

    fn string(&mut self, what: &'static str, limit: u64) -> Result<String, GgufError> {
        let len = bounded(what, self.u64(what)?, limit)?;
        let at = self.at;
        let bytes = self.slice(len as usize, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(GgufError::Utf8 { what, at }),
        }
    }

    fn boolean(&mut self, key: &str) -> Result<bool, GgufError> {
        match self.take::<1>("a boolean")? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(GgufError::Bool { key: key.into() }),
        }
    }

    fn value(&mut self, key: &str, value_type: u32) -> Result<Value, GgufError> {
        const WHAT: &str = "a metadata value";
        Ok(match value_type {
            0 => Value::U8(u8::from_le_bytes(self.take(WHAT)?)),
            1 => Value::I8(i8::from_le_bytes(self.take(WHAT)?)),
            2 => Value::U16(u16::from_le_bytes(self.take(WHAT)?)),
            3 => Value::I16(i16::from_le_bytes(self.take(WHAT)?)),
            4 => Value::U32(u32::from_le_bytes(self.take(WHAT)?)),
            5 => Value::I32(i32::from_le_bytes(self.take(WHAT)?)),
            6 => Value::F32(f32::from_le_bytes(self.take(WHAT)?)),
            7 => Value::Bool(self.boolean(key)?),
            8 => Value::String(self.string(WHAT, MAX_STRING_BYTES)?),
            9 => Value::Array(self.array(key)?),
            10 => Value::U64(u64::from_le_bytes(self.take(WHAT)?)),
            11 => Value::I64(i64::from_le_bytes(self.take(WHAT)?)),
            12 => Value::F64(f64::from_le_bytes(self.take(WHAT)?)),
            found => return Err(GgufError::ValueType { key: key.into(), found }),
        })
    }

    fn array(&mut self, key: &str) -> Result<Array, GgufError> {
        const WHAT: &str = "a metadata array";
        let element_type = self.u32(WHAT)?;
        let len = bounded("an array's length", self.u64(WHAT)?, MAX_ARRAY_LEN)? as usize;
        Ok(match element_type {
            0 => Array::U8(self.numbers(len, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(len, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(len, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(len, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(len, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(len, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(len, f32::from_le_bytes)?),
            7 => {
                let mut out = Vec::with_capacity(len.min(self.remaining()));
                for _ in 0..len {
                    out.push(self.boolean(key)?);
                }
                Array::Bool(out)
            }
            8 => {
                // A string takes at least its 8 bytes of length.
                let mut out = Vec::with_capacity(len.min(self.remaining() / 8));
                for _ in 0..len {
                    out.push(self.string(WHAT, MAX_STRING_BYTES)?);
                }
                Array::String(out)
            }
            10 => Array::U64(self.numbers(len, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(len, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(len, f64::from_le_bytes)?),
            found => return Err(GgufError::ValueType { key: key.into(), found }),
        })
    }

    fn numbers<T, const N: usize>(&mut self, len: usize, convert: fn([u8; N]) -> T) -> Result<Vec<T>, GgufError> {
        // `len` is at most MAX_ARRAY_LEN, so the product fits; the slice is checked before anything is allocated.
        let bytes = self.slice(len * N, "a metadata array")?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|&chunk| convert(chunk)).collect())
    }

    fn tensor(&mut self) -> Result<Described, GgufError> {
        const WHAT: &str = "a tensor's description";
        let name = self.string("a tensor's name", MAX_NAME_BYTES)?;
        let count = bounded(
            "a tensor's dimension count",
            self.u32(WHAT)?.into(),
            MAX_DIMENSIONS.into(),
        )?;
        let mut dimensions = Vec::with_capacity(count as usize);
        for _ in 0..count {
            dimensions.push(self.u64(WHAT)?);
        }
        let dtype = TensorType::from_number(self.u32(WHAT)?);
        let offset = self.u64(WHAT)?;
        Ok(Described {
            name,
            dimensions,
            dtype,
            offset,
        })
    }
}
