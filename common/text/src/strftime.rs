//! Dates for chat templates, in UTC.

/// `format` with the directives that chat templates use (`%Y %y %m %d %e %j %H %I %M %S %p %b %B %a %A %%`) filled in; `None` for any other directive.
pub(crate) fn strftime(format: &str, unix_seconds: u64) -> Option<String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let days = unix_seconds / 86_400;
    let (hour, minute, second) = (unix_seconds / 3600 % 24, unix_seconds / 60 % 60, unix_seconds % 60);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        out.push_str(&match characters.next()? {
            'Y' => format!("{year:04}"),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'j' => format!("{:03}", days - days_before(year) + 1),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'B' => month_name.to_owned(),
            'b' => month_name[..3].to_owned(),
            'A' => day_name.to_owned(),
            'a' => day_name[..3].to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        });
    }
    Some(out)
}

/// Days from 1970 to the start of this year.
fn days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

/// (year, month, day) of days since 1970, by the proleptic Gregorian calendar. After Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_dates() {
        let all = "%Y-%m-%d %e %j %H:%M:%S %I %p %b %B %a %A %y %%";
        // Checked against Python's datetime.
        let check = |seconds, expected: &str| assert_eq!(strftime(all, seconds).unwrap(), expected);
        check(0, "1970-01-01  1 001 00:00:00 12 AM Jan January Thu Thursday 70 %");
        check(
            951_827_696,
            "2000-02-29 29 060 12:34:56 12 PM Feb February Tue Tuesday 00 %",
        );
        check(
            1_735_689_599,
            "2024-12-31 31 366 23:59:59 11 PM Dec December Tue Tuesday 24 %",
        );
        check(
            4_107_542_400,
            "2100-03-01  1 060 00:00:00 12 AM Mar March Mon Monday 00 %",
        );
        assert_eq!(strftime("%Q", 0), None);
        assert_eq!(strftime("%", 0), None);
    }
}
