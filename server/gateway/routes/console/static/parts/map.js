// The map of anchors, drawn in SVG: dots by how many items an anchor has, a user with lines to those who speak.
import { html } from './html.js';
import { percent } from './words.js';

const [WIDE, HIGH, MARGIN] = [640, 420, 44];

export function AnchorMap({ anchors, user }) {
  const dots = anchors.filter(({ at }) => at);
  const here = user?.at;
  const place = frame([...dots.map(({ at }) => at), ...(here ? [here] : [])]);
  const most = Math.max(...dots.map(({ items }) => items));
  const byId = new Map(dots.map((dot) => [dot.id, dot]));
  const lines = here ? user.anchors.filter(({ id }) => byId.has(id)) : [];
  const speaking = new Set(lines.map(({ id }) => id));
  const said = `${dots.length} anchors${here ? `, and ${user.user_id} with lines to ${lines.map(({ id, weight }) => `${id}, ${percent(weight)}`).join(' and ')}` : ''}`;
  return html`<svg class="map" viewBox=${`0 0 ${WIDE} ${HIGH}`} role="img" aria-label=${`Map of ${said}`}>
    <rect class="ground" width=${WIDE} height=${HIGH} rx="8" />
    ${lines.map(({ id, weight }) => {
      const [x1, y1] = place(here);
      const [x2, y2] = place(byId.get(id).at);
      return html`<line key=${id} class=${weight < 0 ? 'tie less' : 'tie'} x1=${x1} y1=${y1} x2=${x2} y2=${y2}
        stroke-width=${1 + 7 * Math.abs(weight)} />`;
    })}
    ${dots.map(({ id, items, at }) => {
      const [x, y] = place(at);
      const radius = 5 + 9 * Math.sqrt(items / (most || 1));
      return html`<g key=${id} class=${speaking.has(id) ? 'anchor speaks' : 'anchor'}>
        <title>${`${id}: ${items} items`}</title>
        <circle cx=${x} cy=${y} r=${radius} />
        <text x=${x} y=${y - radius - 5}>${id}</text>
      </g>`;
    })}
    ${here && html`<g class="person"><title>${user.user_id}</title>
      <circle cx=${place(here)[0]} cy=${place(here)[1]} r="8" />
      <text x=${place(here)[0]} y=${place(here)[1] + 24}>${shortened(user.user_id)}</text></g>`}
  </svg>`;
}

const shortened = (id) => (id.length > 24 ? `${id.slice(0, 23)}…` : id);

/** Coordinates of the bank → of the picture, with one scale for both axes: distances are meant. */
function frame(points) {
  const range = (axis) => [Math.min(...points.map((at) => at[axis])), Math.max(...points.map((at) => at[axis]))];
  const [[left, right], [low, high]] = [range(0), range(1)];
  const scale = Math.min((WIDE - 2 * MARGIN) / (right - left || 1), (HIGH - 2 * MARGIN) / (high - low || 1));
  return ([x, y]) => [WIDE / 2 + (x - (left + right) / 2) * scale, HIGH / 2 - (y - (low + high) / 2) * scale];
}
