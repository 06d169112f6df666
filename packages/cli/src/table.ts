/** Owns how figures are shown to people: tables, bytes, rates, durations. */

/** Columns as wide as their widest cell; cells of `right` (by column) stand at the right. */
export function table(rows: readonly (readonly string[])[], right: readonly number[] = []): string {
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? [];
  return rows
    .map((row) =>
      row
        .map((cell, column) =>
          right.includes(column) ? cell.padStart(widths[column] ?? 0) : cell.padEnd(widths[column] ?? 0),
        )
        .join('   ')
        .trimEnd(),
    )
    .join('\n');
}

const UNITS = ['', 'Ki', 'Mi', 'Gi', 'Ti'] as const;

/** 1536 -> `1.5 KiB` */
export function bytesText(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${UNITS[unit]}B`;
}

const COUNTS = ['', ' k', ' M', ' G'] as const;

/** 1313000 -> `1.31 M` */
export function countText(count: number): string {
  let value = count;
  let unit = 0;
  while (value >= 1000 && unit < COUNTS.length - 1) {
    value /= 1000;
    unit++;
  }
  return unit === 0 ? String(value) : `${value.toPrecision(3)}${COUNTS[unit]}`;
}

/** 75 -> `1:15` */
export function durationText(seconds: number): string {
  const whole = Math.ceil(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  const two = (value: number): string => String(value).padStart(2, '0');
  return hours > 0 ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}
