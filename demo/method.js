// One method field: a choice, a form made from the method's settings, and the same as text. Its value is the text.
const methods = JSON.parse(document.getElementById('vlmfix-methods').textContent);
const [choice, about, expect, form, text] = ['select', '.about', '.expect', '.form', '.spec'].map(at => element.querySelector(at));
const id = 'method-' + Math.random().toString(36).slice(2);
const make = (tag, properties, ...inside) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...inside);
  return made;
};

function row(setting, value, n) {
  const field = `${id}-${n}`;
  const input = setting.choices.length ? make('select', {id: field}) : make('input', {id: field, placeholder: setting.default});
  if (setting.choices.length) {
    input.append(make('option', {value: ''}, setting.default ? `${setting.default} (default)` : 'by variant or model'));
    for (const one of setting.choices) if (one !== setting.default) input.append(make('option', {value: one}, one));
  }
  input.value = value;
  input.name = setting.name;
  input.setAttribute('aria-describedby', `${field}-about`);
  input.addEventListener('input', write);
  const label = make('label', {htmlFor: field}, setting.name);
  return make('div', {className: 'setting'}, label, input, make('small', {id: `${field}-about`}, setting.about));
}

function show(spec) {
  const [name, rest] = spec.split(/:(.*)/s);
  const method = methods[name];
  choice.value = method ? name : '';
  text.value = spec;
  about.textContent = method ? method.about : 'as typed below';
  expect.textContent = method ? method.expect : '';
  const given = Object.fromEntries((rest || '').split(',').map(part => part.split(/=(.*)/s)));
  form.replaceChildren(...(method ? method.settings : []).map((one, n) => row(one, given[one.name] ?? '', n)));
}

function write() {
  const given = [...form.querySelectorAll('input, select')].filter(one => one.value.trim());
  const said = given.map(one => `${one.name}=${one.value.trim()}`).join(',');
  props.value = choice.value + (said && ':' + said);
  text.value = props.value;
}

choice.append(...Object.keys(methods).map(name => make('option', {value: name}, name)), make('option', {value: ''}, 'as text …'));
element.querySelectorAll('label').forEach(one => { one.htmlFor = id + one.dataset.of; });
choice.id = id + 'choice';
text.id = id + 'text';
choice.addEventListener('change', () => {
  if (choice.value) {
    props.value = choice.value;
    show(props.value);
  } else {
    element.querySelector('details').open = true;
    text.select();
  }
});
text.addEventListener('change', () => {
  props.value = text.value.trim() || 'none';
  show(props.value);
});
show(props.value || 'none');
watch('value', () => show(props.value || 'none'));
