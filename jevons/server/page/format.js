// Numbers as people read them. A missing number is a dash, never a zero: what a server does not say is not known.

const DASH = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : DASH);

export const counted = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

export const percent = (value) => (known(value) ? `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %` : DASH);

export const rate = (value) => (known(value) ? (value < 100 ? value.toFixed(1) : count(value)) : DASH);

export function seconds(value) {
  if (!known(value)) return DASH;
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
}

/** Dollars, with two digits that matter: one reply costs a small part of a cent. */
export function money(value) {
  if (!known(value)) return DASH;
  if (value === 0) return "$0";
  if (Math.abs(value) >= 1) return `$${value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
  const digits = Math.min(12, 1 - Math.floor(Math.log10(Math.abs(value))));
  return `$${value.toFixed(Math.max(2, digits))}`;
}

export function duration(value) {
  if (!known(value)) return DASH;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const at = units.findIndex(([, size]) => value >= size);
  if (at < 0) return "0 s";
  const [[name, size], smaller] = [units[at], units[at + 1]];
  const rest = smaller ? Math.floor((value % size) / smaller[1]) : 0;
  return `${Math.floor(value / size)} ${name}${rest ? ` ${rest} ${smaller[0]}` : ""}`;
}

/** Under which heading a conversation is listed. */
export function day(time, now = Date.now()) {
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - 86400e3) return "Yesterday";
  if (time >= midnight - 6 * 86400e3) return "Last 7 days";
  return new Date(time).toLocaleDateString("en-US", { month: "long", year: "numeric" });
}
