// Reads samples from text: JSON, newline-delimited JSON or CSV.

/** {samples: [{input, output}…], faults: [sentence…]}. */
export function readSamples(text) {
	const plain = text.replace(/^\uFEFF/, '').trim();
	if (!plain) return { samples: [], faults: [] };
	const whole = parsed(plain);
	if (whole !== undefined) {
		const list = Array.isArray(whole) ? whole : whole?.samples;
		return checked(Array.isArray(list) ? list : [whole], (index) => `sample ${index + 1}`);
	}
	if (plain.startsWith('{')) {
		const lines = plain.split('\n').map((line, index) => [line.trim(), index]).filter(([line]) => line);
		return checked(lines.map(([line]) => parsed(line)), (index) => `line ${lines[index][1] + 1}`);
	}
	if (plain.startsWith('[')) return { samples: [], faults: ['This starts like a JSON array but is not valid JSON'] };
	return fromCsv(plain);
}

/** The value of a JSON text, or undefined. */
export function parsed(text) {
	try {
		return JSON.parse(text);
	} catch {
		return undefined;
	}
}

function checked(values, place) {
	const samples = [];
	const faults = [];
	values.forEach((value, index) => {
		const missing = ['input', 'output'].filter((field) => !given(value?.[field], field));
		if (value === undefined) faults.push(`${place(index)} is not JSON`);
		else if (missing.length) faults.push(`${place(index)} has no ${missing.join(' and no ')}`);
		else samples.push({ input: value.input, output: value.output });
	});
	return { samples, faults };
}

const given = (value, field) => (typeof value === 'string' && value !== '') || (field === 'input' && Array.isArray(value));

function fromCsv(text) {
	const [head, ...rows] = csv(text);
	const columns = head.map((name) => name.trim().toLowerCase());
	const [input, output] = [columns.indexOf('input'), columns.indexOf('output')];
	if (input < 0 || output < 0) {
		return { samples: [], faults: ['This is neither JSON nor CSV with the columns input and output'] };
	}
	return checked(rows.map((row) => ({ input: row[input], output: row[output] })), (index) => `row ${index + 2}`);
}

/** Parses RFC 4180; the separator is the most frequent of comma, semicolon and tab in the first line. */
function csv(text) {
	const first = text.split('\n', 1)[0];
	const comma = [',', ';', '\t'].sort((a, b) => first.split(b).length - first.split(a).length)[0];
	const rows = [];
	let [row, field, quoted] = [[], '', false];
	for (let i = 0; i < text.length; i++) {
		const sign = text[i];
		if (quoted) {
			if (sign !== '"') field += sign;
			else if (text[i + 1] === '"') { field += '"'; i++; } else quoted = false;
		} else if (sign === '"' && field === '') quoted = true;
		else if (sign === comma) { row.push(field); field = ''; } else if (sign === '\n') {
			rows.push([...row, field.replace(/\r$/, '')]);
			[row, field] = [[], ''];
		} else field += sign;
	}
	rows.push([...row, field]);
	return rows.filter((fields) => fields.some((value) => value.trim()));
}
